"""Person re-identification without identity labels, as a plugin to FastReID and torchreid.

Importing this package imports neither host. ``import selcon_plugin.fastreid_ext`` registers
everything with FastReID. What is listed in ``__all__`` is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from selcon_plugin import _moved
from selcon_plugin._version import __version__

if TYPE_CHECKING:
    from selcon_plugin.features import Embeddings
    from selcon_plugin.inference.embedder import Embedder
    from selcon_plugin.inference.folder_features import FolderFeatures
    from selcon_plugin.retrieval import Index, search
    from selcon_plugin.workflows.cluster_folder import cluster
    from selcon_plugin.workflows.fit import FitResult, fit
    from selcon_plugin.workflows.folder_clusters import FolderClusters

__all__ = [
    "Embedder",
    "Embeddings",
    "FitResult",
    "FolderClusters",
    "FolderFeatures",
    "Index",
    "__version__",
    "cluster",
    "fit",
    "search",
]

_moved.install()

_MODULES = {
    "Embedder": "selcon_plugin.inference.embedder",
    "Embeddings": "selcon_plugin.features",
    "FitResult": "selcon_plugin.workflows.fit",
    "FolderClusters": "selcon_plugin.workflows.folder_clusters",
    "FolderFeatures": "selcon_plugin.inference.folder_features",
    "Index": "selcon_plugin.retrieval",
    "cluster": "selcon_plugin.workflows.cluster_folder",
    "fit": "selcon_plugin.workflows.fit",
    "search": "selcon_plugin.retrieval",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

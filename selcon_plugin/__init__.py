"""Person re-identification without identity labels, as a plugin to FastReID and torchreid.

Importing this package imports neither host. ``import selcon_plugin.fastreid_ext`` registers
everything with FastReID.
"""

from selcon_plugin.features import Embeddings

__version__ = "0.1.0"

__all__ = ["Embeddings", "__version__"]

"""FastReID adapter, which registers everything with FastReID when it is imported.

* meta-architecture ``SelCon``, head ``GlobalPartHead``, backbones ``build_timm_backbone``
  and ``build_torchreid_backbone``;
* data sets ``ImageFolderReID`` and ``SyntheticPersons``;
* ``SelConTrainer``, which replaces FastReID's ``DefaultTrainer``, and its
  ``ClusteringHook`` for methods that cluster. A script that keeps ``DefaultTrainer`` gets
  a ``SelConTrainer`` where its config selects ``SelCon``.

This folder translates FastReID's config, loaders, hooks and checkpoints. Anything that does
not import FastReID belongs to another folder.
"""

from selcon_plugin.compat.fastreid import prepare_fastreid

prepare_fastreid()

from selcon_plugin.fastreid_ext.backbones import (  # noqa: E402
    build_timm_backbone,
    build_torchreid_backbone,
)
from selcon_plugin.fastreid_ext.clustering_hook import ClusteringHook  # noqa: E402
from selcon_plugin.fastreid_ext.config import add_selcon_config, complete_config  # noqa: E402
from selcon_plugin.fastreid_ext.datasets import ImageFolderReID, SyntheticPersons  # noqa: E402
from selcon_plugin.fastreid_ext.heads import GlobalPartHead  # noqa: E402
from selcon_plugin.fastreid_ext.meta_arch import SelCon  # noqa: E402
from selcon_plugin.fastreid_ext.scripts import register_trainer  # noqa: E402
from selcon_plugin.fastreid_ext.trainer import SelConTrainer  # noqa: E402

register_trainer()

__all__ = [
    "ClusteringHook",
    "GlobalPartHead",
    "ImageFolderReID",
    "SelCon",
    "SelConTrainer",
    "SyntheticPersons",
    "add_selcon_config",
    "build_timm_backbone",
    "build_torchreid_backbone",
    "complete_config",
]

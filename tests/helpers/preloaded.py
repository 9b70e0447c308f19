"""Imports of the fork server, done once for all programs because they take most time."""

import contextlib
import gc
import importlib
import sys

from helpers.network import forbid_network
from selcon_plugin.compat import prepare_torchvision

PATH = sys.path[1:]  # without the first entry, which belongs to the program

forbid_network()
prepare_torchvision()
for _name in (
    *("pytest", "timm", "torch.distributed.run", "torch.utils.tensorboard"),
    *("sklearn.cluster", "sklearn.metrics", "sklearn.manifold"),
    "selcon_plugin.cli.main",
    "selcon_plugin.inference.embedder",
    "selcon_plugin.report.page",
    "selcon_plugin.fastreid_ext.trainer",
    "selcon_plugin.torchreid_ext.train",
    "selcon_plugin.clustering.compiled.jaccard_kernels",
):
    with contextlib.suppress(ImportError):  # a host or a library may be missing
        importlib.import_module(_name)

gc.freeze()  # keeps the collector from copying the pages that all programs share

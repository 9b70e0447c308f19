"""What the fork server imports once for all programs: most of what a program waits for."""

import contextlib
import gc
import importlib
import sys

from selcon_plugin.compat import prepare_torchvision

PATH = sys.path[1:]  # without the entry of the program, which is the first

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

gc.freeze()  # the collector leaves the pages that all programs share untouched

"""Evaluations by a host that never sees the plugin, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

# What both hosts lack on current PyTorch, written without the plugin.
_SHIMS = """
import collections, collections.abc, json, sys, types
import torch
collections.Mapping = collections.abc.Mapping
six = types.ModuleType("torch._six")
six.string_classes = (str, bytes)
sys.modules["torch._six"] = torch._six = six
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
"""

_FASTREID = """
from torch.utils.data import DataLoader
import fastreid.data.data_utils as data_utils
class Loader(DataLoader):
    def __init__(self, local_rank, **kwargs):
        super().__init__(**{**kwargs, "pin_memory": False})
data_utils.DataLoaderX = Loader
import fastreid.data.build
fastreid.data.build.DataLoaderX = Loader
import fastreid.evaluation.reid_evaluation as evaluation
evaluation.compile_helper = lambda: None
from fastreid.config import get_cfg
from fastreid.engine import DefaultTrainer
from fastreid.utils.checkpoint import Checkpointer
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
cfg.DATASETS.TESTS = ("Market1501",)
model = DefaultTrainer.build_model(cfg)
Checkpointer(model).load(cfg.MODEL.WEIGHTS)
found = DefaultTrainer.test(cfg, model)
result = {"mAP": float(found["mAP"])}
"""

_TORCHREID = """
import contextlib, io
import numpy
if not hasattr(numpy, "bool"):
    numpy.bool = bool
try:
    import torchreid.reid as torchreid
    from torchreid.reid import data, engine, models, optim, utils
except ImportError:
    import torchreid
    from torchreid import data, engine, models, optim, utils
import yaml
cfg = yaml.safe_load(open(sys.argv[1]))
with contextlib.redirect_stdout(io.StringIO()):
    manager = data.ImageDataManager(
        root=sys.argv[2], sources=["market1501"], targets=["market1501"],
        height=cfg["data"]["height"], width=cfg["data"]["width"],
        norm_mean=cfg["data"]["norm_mean"], norm_std=cfg["data"]["norm_std"],
        batch_size_train=8, batch_size_test=32, workers=0, use_gpu=False,
    )
    model = models.build_model(
        cfg["model"]["name"], num_classes=manager.num_train_pids, pretrained=False,
        use_gpu=False,
    )
    utils.load_pretrained_weights(model, cfg["model"]["load_weights"])
    tester = engine.ImageSoftmaxEngine(
        manager, model, optim.build_optimizer(model), use_gpu=False
    )
    tester.writer = None
    model.eval()
    loader = manager.test_loader["market1501"]
    rank1, mAP = tester._evaluate(
        dataset_name="market1501", query_loader=loader["query"],
        gallery_loader=loader["gallery"], dist_metric=cfg["test"]["dist_metric"],
        normalize_feature=cfg["test"]["normalize_feature"], ranks=[1],
    )
result = {"mAP": 100 * float(mAP)}
"""

_END = """
assert not [name for name in sys.modules if name.startswith("selcon")]
print("RESULT", json.dumps(result))
"""


def as_market(synthetic: Path, root: Path) -> Path:
    """Copy a data set of synthetic persons to where either host looks for Market-1501."""
    for place in (root, root / "market1501"):
        shutil.copytree(synthetic, place / "Market-1501-v15.09.15")
    return root


def map_by_host_only(host: str, folder: Path, market: Path) -> float:
    """Evaluate an exported network with its host only.

    Args:
        host: ``"fastreid"`` or ``"torchreid"``.
        folder: Folder that ``selcon export`` wrote.
        market: Result of :func:`as_market`.

    Returns:
        mAP in percent.
    """
    script = _SHIMS + {"fastreid": _FASTREID, "torchreid": _TORCHREID}[host] + _END
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder / "config.yaml"), market],
        capture_output=True,
        text=True,
        cwd=folder,  # where no package of this checkout is found
        env={
            "PATH": "/usr/bin:/bin",
            "FASTREID_DATASETS": str(market),
            "HOME": str(folder),
        },
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found: float = json.loads(lines[-1].removeprefix("RESULT"))["mAP"]
    return found

"""Two processes do what one does: same banks on both ranks, same loss curve."""

import numpy as np
import pytest
import torch
from fastreid.config import get_cfg
from fastreid.engine.train_loop import HookBase
from fastreid.utils import comm
from PIL import Image
from torch import nn

from helpers.ddp import spawn_from_server
from selcon_plugin.config.loading import Merger
from selcon_plugin.fastreid_ext import SelConTrainer, add_selcon_config
from selcon_plugin.fastreid_ext import launch as launching
from selcon_plugin.fastreid_ext.config import KEYS
from selcon_plugin.fastreid_ext.embedding import unwrap
from selcon_plugin.fastreid_ext.launch import launch


@pytest.fixture(autouse=True)
def _ranks_of_the_fork_server(monkeypatch):
    monkeypatch.setattr(launching, "spawn", spawn_from_server)


class LossRecorder(HookBase):
    def __init__(self):
        self.losses = []

    def after_step(self):
        if comm.is_main_process():
            self.losses.append(self.trainer.storage.latest()["total_loss"][0])


def freeze_batch_norm(model):
    """Hold batch norm in eval mode: without it the ranks would use their own statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module


def train_and_save(cfg, folder):
    torch.set_num_threads(1)
    trainer = SelConTrainer(cfg)
    trainer.resume_or_load(False)
    freeze_batch_norm(trainer.model)
    recorder = LossRecorder()
    trainer.register_hooks([recorder])
    trainer.train()
    state = unwrap(trainer.model).state_dict()
    torch.save((recorder.losses, state), f"{folder}/rank{comm.get_rank()}.pt")


CLUSTERED = {
    "MODEL.SELCON.CLUSTERING.EPS": 0.7,
    "MODEL.SELCON.CLUSTERING.MIN_SAMPLES": 2,
    "MODEL.SELCON.CLUSTERING.K1": 8,
    "MODEL.SELCON.CLUSTERING.K2": 3,
    "MODEL.SELCON.CAMERA_WEIGHT": "batch",
    "DATALOADER.NUM_INSTANCE": 4,  # one cluster to each of two processes
    "SOLVER.BASE_LR": 0.001,
}
METHODS = {
    "SelectiveContrastive": {},
    "SelectiveContrastive by jaccard": CLUSTERED | {"MODEL.SELCON.SELECTION": "jaccard"},
    "ClusterContrast": CLUSTERED | {"MODEL.SELCON.CLUSTER_UPDATE": "hard"},
    "SelConCluster": CLUSTERED | {"MODEL.SELCON.OUTLIER_RATIO": 0.5},
}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(tiny_cfg, tmp_path, name):
    tiny_cfg.SOLVER.MAX_EPOCH = 3
    tiny_cfg.MODEL.BACKBONE.NORM = "BN"
    tiny_cfg.MODEL.SELCON.METHOD = name.partition(" ")[0]
    Merger(tiny_cfg, KEYS).merge_overrides(METHODS[name])
    if name == "ClusterContrast":
        # Set by the tiny config for another method, refused here.
        defaults = add_selcon_config(get_cfg()).MODEL.SELCON
        for key in ("NUM_NEIGHBORS", "NUM_NEGATIVES", "WARMUP_EPOCHS"):
            tiny_cfg.MODEL.SELCON[key] = defaults[key]
    folders = [tmp_path / name for name in ("one", "several")]
    for folder, count in zip(folders, (1, 2), strict=True):
        folder.mkdir()
        tiny_cfg.OUTPUT_DIR = str(folder)
        launch(train_and_save, count, args=(tiny_cfg, str(folder)))
    losses, single = torch.load(folders[0] / "rank0.pt")
    losses_several, first = torch.load(folders[1] / "rank0.pt")
    _, second = torch.load(folders[1] / "rank1.pt")
    for key, value in first.items():
        assert torch.equal(second[key], value), key
    assert len(losses) == 15
    if "jaccard" in name:
        # Jaccard distances are often all but equal, and the rounding of the features
        # decides which comes first: the same until the first of them is used.
        assert losses_several[:5] == pytest.approx(losses[:5], abs=1e-5)
        return
    # Sums over the batch are taken in another order: 1e-5 after 15 steps.
    assert losses_several == pytest.approx(losses, abs=1e-5)
    assert torch.equal(first["method.labels"], single["method.labels"])
    for bank in (name for name in first if name.endswith("bank")):
        assert torch.allclose(first[bank], single[bank], atol=1e-4), bank


def test_batch_must_divide_among_processes(tiny_cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(
        ValueError, match=r"\(8, .*multiple of .* processes \(3\) .*IMS_PER"
    ):
        SelConTrainer.build_train_loader(tiny_cfg)


@pytest.mark.slow
def test_process_without_an_image_at_extraction_trains_along(tiny_cfg, tmp_path):
    """Four images: the third of three processes has none to extract."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (64, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    tiny_cfg.DATASETS.NAMES, tiny_cfg.DATASETS.TESTS = ("ImageFolderReID",), ()
    tiny_cfg.DATASETS.IMAGE_FOLDER.ROOT = str(folder)
    tiny_cfg.SOLVER.IMS_PER_BATCH = 3
    launch(train_and_save, 3, args=(tiny_cfg, str(tmp_path)))
    losses, first = torch.load(tmp_path / "rank0.pt")
    assert len(losses) == 2
    _, third = torch.load(tmp_path / "rank2.pt")
    assert first["method.memory.global_bank"].norm(dim=1).min() > 0.99
    for key, value in first.items():
        assert torch.equal(third[key], value), key

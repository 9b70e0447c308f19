"""FastReID's own supervised baseline, as a reference for methods without identities."""

from __future__ import annotations

from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.data.build import build_reid_train_loader
from fastreid.data.common import CommDataset
from fastreid.data.transforms import build_transforms
from fastreid.engine.defaults import DefaultTrainer
from fastreid.modeling.backbones import build_backbone

from selcon_plugin.engine.run import seed_all
from selcon_plugin.fastreid_ext import data as selcon_data
from selcon_plugin.fastreid_ext.datasets import build_dataset
from selcon_plugin.fastreid_ext.host_values import input_size
from selcon_plugin.fastreid_ext.results import results_by_test_set
from selcon_plugin.models.feature_map import infer_feature_shape
from selcon_plugin.runs.results import RunMeter, write_results

# FastReID's strong baseline ("bag of tricks"): cross entropy and triplet loss, BN neck.
_RECIPE = {
    "MODEL.META_ARCHITECTURE": "Baseline",
    "MODEL.HEADS.NAME": "EmbeddingHead",
    "MODEL.HEADS.WITH_BNNECK": True,
    "MODEL.LOSSES.NAME": ("CrossEntropyLoss", "TripletLoss"),
    "MODEL.LOSSES.CE.EPSILON": 0.1,
    "MODEL.LOSSES.TRI.MARGIN": 0.3,
    "MODEL.LOSSES.TRI.HARD_MINING": True,
    "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
}


def supervised_config(cfg: CfgNode) -> CfgNode:
    """Return the config of the baseline with network and budget of another config.

    Args:
        cfg: Complete config.

    Returns:
        Config whose backbone, input, data, optimizer and test are the same.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([word for pair in _RECIPE.items() for word in pair])
    return cfg


class _Baseline(DefaultTrainer):
    """FastReID's trainer with the plugin's data sets and number of steps."""

    def __init__(self, cfg: CfgNode) -> None:
        self._steps: int = cfg.MODEL.SELCON.ITERS_PER_EPOCH
        super().__init__(cfg)

    @property
    def iters_per_epoch(self) -> int:
        """Optimizer steps per epoch, those of the runs to compare with."""
        return self._steps

    @iters_per_epoch.setter
    def iters_per_epoch(self, steps: int) -> None:
        self._steps = self._steps or steps

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build FastReID's train loader, with identities."""
        items: list[Any] = []
        for name in cfg.DATASETS.NAMES:
            options = {"splits": ("train",), "combineall": cfg.DATASETS.COMBINEALL}
            items += build_dataset(cfg, name, **options).train
        transform = build_transforms(cfg, is_train=True)
        return build_reid_train_loader(
            cfg, train_set=CommDataset(items, transform, relabel=True)
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build the test loader of a data set of FastReID or the plugin."""
        return selcon_data.build_test_loader(cfg, dataset_name)


def train_supervised(cfg: CfgNode) -> None:
    """Train and evaluate the baseline, and write ``results.json``.

    Args:
        cfg: Result of :func:`supervised_config`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    seed_all(cfg.MODEL.SELCON.SEED)
    # FastReID's head needs the channels of the map.
    shape = infer_feature_shape(build_backbone(cfg), input_size(cfg))
    cfg.MODEL.BACKBONE.FEAT_DIM = shape[0]
    seed_all(cfg.MODEL.SELCON.SEED)
    selcon_data.check_test_sets(cfg)
    trainer, meter = _Baseline(cfg), RunMeter()
    trainer.test = meter.excluding(trainer.test)
    trainer.resume_or_load(resume=False)
    with meter.running():
        results = trainer.train() or {}
    write_results(
        cfg.OUTPUT_DIR,
        method="Baseline",
        seed=cfg.MODEL.SELCON.SEED,
        num_images=len(trainer.data_loader.dataset),
        epochs=trainer.max_epoch,
        steps=trainer.max_iter,
        metrics={
            name: {metric: float(value) for metric, value in found.items()}
            for name, found in results_by_test_set(cfg, results).items()
        },
        meter=meter,
        num_clusters=None,
        device=torch.device(cfg.MODEL.DEVICE),
        host="fastreid",
    )

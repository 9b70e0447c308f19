"""torchreid's own supervised baseline, as a reference for methods without identities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.engine.run import seed_all
from selcon_plugin.models.pretrained import load_weights, read_state_dict
from selcon_plugin.models.timm import TIMM_PREFIX
from selcon_plugin.models.torchreid import MODEL_PREFIX, build_named_model
from selcon_plugin.runs.results import RunMeter, write_results
from selcon_plugin.torchreid_ext.config import run_arguments
from selcon_plugin.torchreid_ext.datasets import plain_name
from selcon_plugin.torchreid_ext.evaluation import EvaluationEngine
from selcon_plugin.torchreid_ext.messages import messages_shown
from selcon_plugin.torchreid_ext.train import build_datamanager, build_schedule

_torchreid: Any = import_torchreid()


def supervised_config(cfg: CfgNode) -> CfgNode:
    """Return the config of the baseline with network and budget of another config.

    Args:
        cfg: Complete config.

    Returns:
        Config whose model, input, data, optimizer and test are the same.

    Raises:
        ValueError: If torchreid does not have the model.
    """
    name = cfg.model.name
    if name.startswith(TIMM_PREFIX):
        raise ValueError(
            f"model.name {name!r} is a model of timm, of which torchreid has no supervised "
            "baseline: compare with a model of torchreid, or leave --supervised out"
        )
    return cfg.clone()


class _Steps:
    """Loader that repeats another one to a number of batches."""

    def __init__(self, loader: Any, steps: int) -> None:
        self._loader, self._steps = loader, steps
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.chain.from_iterable(itertools.repeat(self._loader))
        return itertools.islice(batches, self._steps)


class _Baseline(EvaluationEngine):
    """torchreid's engine for cross entropy, with the plugin's evaluation."""

    forward_backward = _torchreid.engine.ImageSoftmaxEngine.forward_backward

    def __init__(
        self, datamanager: Any, model: nn.Module, optimizer: Any, scheduler: Any, cfg: Any
    ) -> None:
        super().__init__(datamanager, cfg.use_gpu)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.register_model("model", model, optimizer, scheduler)
        self.criterion = _torchreid.losses.CrossEntropyLoss(
            num_classes=datamanager.num_train_pids,
            use_gpu=self.use_gpu,
            label_smooth=cfg.loss.softmax.label_smooth,
        )
        if cfg.selcon.iters_per_epoch:
            loader = datamanager.train_loader
            self.train_loader: Any = _Steps(loader, cfg.selcon.iters_per_epoch)
        self.meter = RunMeter()

    def train(self, *args: Any, **kwargs: Any) -> None:
        with self.meter.running():
            super().train(*args, **kwargs)


def train_supervised(cfg: CfgNode) -> None:
    """Train and evaluate the baseline, and write ``results.json``.

    Args:
        cfg: Result of :func:`supervised_config`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("open_layers", "new_layers"):  # the head stands for the classifier
        names = cfg.train[key]
        cfg.train[key] = ["classifier" if name == "heads" else name for name in names]
    node, folder = cfg.selcon, cfg.data.save_dir
    seed_all(node.seed)
    data = build_datamanager(cfg)
    model = build_named_model(
        cfg.model.name.removeprefix(MODEL_PREFIX),
        num_classes=data.num_train_pids,
        pretrained=cfg.model.pretrained and not node.weights,
    )
    if cfg.model.pretrained and node.weights:
        file = Path(node.weights).expanduser()
        load_weights(model, read_state_dict(file), node.weights)
    model = nn.DataParallel(model).cuda() if cfg.use_gpu else model
    optimizer, scheduler = build_schedule(cfg, model, new_layers=cfg.train.new_layers)
    engine = _Baseline(data, model, optimizer, scheduler, cfg)
    with messages_shown():
        engine.run(folder, **run_arguments(cfg))
    write_results(
        folder,
        method="softmax",
        seed=node.seed,
        num_images=len(data.train_loader.dataset),
        epochs=cfg.train.max_epoch,
        steps=cfg.train.max_epoch * len(engine.train_loader),
        metrics={plain_name(name): found for name, found in engine.results.items()},
        meter=engine.meter,
        num_clusters=None,
        device=torch.device("cuda" if cfg.use_gpu else "cpu"),
        host="torchreid",
    )

"""File ``results.json`` of a run in FastReID."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from selcon_plugin.runs import results as run_record
from selcon_plugin.runs.metrics import read_metrics


def results_by_test_set(cfg: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return FastReID's results by test set; FastReID omits the name of a single one.

    Args:
        cfg: Complete config.
        results: Result of ``SelConTrainer.train`` or ``test``.

    Returns:
        Metrics by the name of the test set; empty without a test set.
    """
    if not results:
        return {}
    names = cfg.DATASETS.TESTS
    return {names[0]: results} if len(names) == 1 else dict(results)


def write_results(trainer: Any, results: Mapping[str, Any] | None) -> None:
    """Write ``results.json`` into the run's folder, on the main process.

    Args:
        trainer: Trainer after the training.
        results: Result of the trainer, the metrics of the last evaluation, if any.
    """
    cfg = trainer.cfg
    metrics = {
        name: {metric: float(value) for metric, value in found.items()}
        for name, found in results_by_test_set(cfg, results or {}).items()
    }
    run_record.write_results(
        cfg.OUTPUT_DIR,
        method=cfg.MODEL.SELCON.METHOD,
        seed=cfg.MODEL.SELCON.SEED,
        num_images=len(trainer.data_loader.dataset),
        epochs=trainer.max_epoch,
        steps=trainer.max_iter,
        metrics=metrics,
        meter=trainer.meter,
        num_clusters=_last_num_clusters(trainer),
        device=torch.device(cfg.MODEL.DEVICE),
        host="fastreid",
    )


def _last_num_clusters(trainer: Any) -> int | None:
    """Return the number of clusters of this process, or in the file of an earlier part."""
    storage = getattr(trainer, "storage", None)  # absent if the run was complete before
    if storage is not None and "num_clusters" in storage.latest():
        return int(storage.latest()["num_clusters"][0])
    if trainer.start_epoch == 0:
        return None  # the file may belong to another run
    file = Path(trainer.cfg.OUTPUT_DIR) / "metrics.json"
    written = read_metrics(file) if file.is_file() else []
    counts = [line["num_clusters"] for line in written if "num_clusters" in line]
    return int(counts[-1]) if counts else None

"""FastReID as a host: load its config, train and evaluate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from selcon_plugin.config.loading import (
    _merge_file,
    _merge_options,
    builtin_config,
    import_files,
)
from selcon_plugin.engine.threads import reserve_cpu_core


def _load_fastreid_config(
    config_file: str, opts: Sequence[str], images: str, camera_pattern: str
) -> Any:
    from fastreid.config import get_cfg

    from selcon_plugin.fastreid_ext import add_selcon_config, complete_config
    from selcon_plugin.fastreid_ext.config import KEYS

    cfg = add_selcon_config(get_cfg())
    if images:
        config_file = config_file or builtin_config("image_folder.yml")
    if config_file:
        _merge_file(cfg, KEYS, config_file)
    _merge_options(cfg, KEYS, opts)
    # Set as they are: a config option would be read as a Python literal, and take the
    # folder "2024" for a number.
    if camera_pattern:
        cfg.DATASETS.IMAGE_FOLDER.CAMERA_PATTERN = camera_pattern
    if images:
        cfg.DATASETS.NAMES, cfg.DATASETS.TESTS = ("ImageFolderReID",), ()
        cfg.DATASETS.IMAGE_FOLDER.ROOT = str(Path(images).expanduser())
        if cfg.MODEL.META_ARCHITECTURE == "Baseline":
            cfg.MODEL.META_ARCHITECTURE = "SelCon"
    return complete_config(cfg)


def run_fastreid(
    cfg: Any,
    *,
    resume: bool = False,
    eval_only: bool = False,
    config_file: str = "",
    imports: Sequence[str] = (),
) -> Any:
    """Train or evaluate in FastReID, in one process of possibly several.

    Args:
        cfg: Complete config.
        resume: Whether to go on from the last checkpoint, if there is one.
        eval_only: Whether to evaluate ``MODEL.WEIGHTS`` instead.
        config_file: Where the config came from, for FastReID's log.
        imports: Python files to import first; a process of its own has not done so.

    Returns:
        FastReID's results.

    Raises:
        ValueError: If there is nothing to evaluate.
    """
    import_files(imports)
    from fastreid.engine import default_setup
    from fastreid.evaluation.testing import verify_results

    from selcon_plugin.fastreid_ext import SelConTrainer
    from selcon_plugin.fastreid_ext.results import results_by_test_set, write_results
    from selcon_plugin.fastreid_ext.trainer import load_trained_model, share_host_log
    from selcon_plugin.runs.results import delete_results

    default_setup(cfg, argparse.Namespace(eval_only=eval_only, config_file=config_file))
    share_host_log()
    if eval_only:
        if not cfg.DATASETS.TESTS:
            raise ValueError("DATASETS.TESTS is empty: there is nothing to evaluate on")
        results = SelConTrainer.test(cfg, load_trained_model(cfg))
    else:
        trainer = SelConTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        delete_results(cfg.OUTPUT_DIR)
        readers = cfg.MODEL.DEVICE == "cpu" and cfg.DATALOADER.NUM_WORKERS
        threads = reserve_cpu_core() if readers else nullcontext()
        with threads, trainer.meter.running():
            results = trainer.train()
        write_results(trainer, results)
    if results:
        verify_results(cfg, results_by_test_set(cfg, results))
    return results

"""torchreid as a host: load its config, train and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from selcon_plugin.config.loading import _merge_file, _merge_options, builtin_config
from selcon_plugin.engine.threads import reserve_cpu_core


def _load_torchreid_config(
    config_file: str, opts: Sequence[str], images: str, camera_pattern: str
) -> Any:
    from selcon_plugin.torchreid_ext.config import KEYS, complete_config, get_default_config

    cfg = get_default_config()
    if images:
        config_file = config_file or builtin_config("torchreid/image_folder.yml")
    if config_file:
        _merge_file(cfg, KEYS, config_file)
    _merge_options(cfg, KEYS, opts)
    if camera_pattern:
        cfg.image_folder.camera_pattern = camera_pattern
    if images:
        cfg.data.sources, cfg.data.targets = ["imagefolderreid"], []
        cfg.image_folder.root = str(Path(images).expanduser())
    return complete_config(cfg)


def run_torchreid(cfg: Any, *, resume: bool = False, eval_only: bool = False) -> None:
    """Train or evaluate in torchreid."""
    from selcon_plugin.torchreid_ext.train import run_config

    if eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.test.evaluate = True
    with reserve_cpu_core() if not cfg.use_gpu and cfg.data.workers else nullcontext():
        run_config(cfg, resume=resume)

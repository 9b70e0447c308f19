"""The hosts, FastReID and torchreid, seen as one: load a config, train, evaluate.

Nothing here parses a command line. The hosts are imported inside the functions: FastReID
reads FASTREID_DATASETS when it is, and ``selcon doctor`` must run where neither can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selcon_plugin.config.checks import read_config_file


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    images: str = "",
    camera_pattern: str = "",
    host: str = "",
) -> Any:
    """Read a config file and options into the checked config of a host.

    Args:
        config_file: Config of the host; empty for its defaults, or with ``images`` for the
            package's own.
        opts: ``KEY VALUE`` pairs.
        images: Folder of images to train on.
        camera_pattern: How to find their cameras.
        host: ``"fastreid"`` or ``"torchreid"``; empty for the one whose keys the file has.

    Returns:
        Complete, frozen config.

    Raises:
        ValueError: If it cannot be read, or a key or a value is wrong.
            ``FileNotFoundError`` if it does not exist.
    """  # noqa: DOC502  (raised by what this calls)
    from selcon_plugin.fastreid_ext.host import _load_fastreid_config
    from selcon_plugin.torchreid_ext.host import _load_torchreid_config

    if config_file:
        read_config_file(config_file)
    load = {"fastreid": _load_fastreid_config, "torchreid": _load_torchreid_config}
    cfg = load[host or host_of(config_file)](config_file, opts, images, camera_pattern)
    cfg.freeze()
    return cfg


def host_of(config_file: str) -> str:
    """Tell by its keys whose config a file is.

    Args:
        config_file: Path, or empty.

    Returns:
        ``"torchreid"`` for keys in lower case, else ``"fastreid"``.

    Raises:
        ValueError: If the file is not YAML of keys and values.
    """  # noqa: DOC502  (raised by what this calls)
    if not config_file:
        return "fastreid"
    keys = list(read_config_file(config_file))
    lower_case = bool(keys) and all(str(key).islower() for key in keys)
    return "torchreid" if lower_case else "fastreid"


def is_torchreid(cfg: Any) -> bool:
    """Tell whether a config is torchreid's."""
    return "selcon" in cfg


def train_config(cfg: Any, *, resume: bool = False) -> None:
    """Train as ``selcon train`` does, in this process.

    Args:
        cfg: Complete config of either host.
        resume: Whether to go on from the last checkpoint in its folder, if there is one.
    """
    from selcon_plugin.fastreid_ext.host import run_fastreid
    from selcon_plugin.torchreid_ext.host import run_torchreid

    (run_torchreid if is_torchreid(cfg) else run_fastreid)(cfg, resume=resume)

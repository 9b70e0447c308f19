"""The hosts, FastReID and torchreid, seen as one: load a config, train, evaluate.

Nothing here parses a command line. The hosts are imported inside the functions: FastReID
reads FASTREID_DATASETS when it is, and ``selcon doctor`` must run where neither can be.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selcon_plugin.engine.checks import flatten_config, read_config_file
from selcon_plugin.options import KINDS

if TYPE_CHECKING:
    from selcon_plugin.engine.settings import ConfigKeys

# yacs: Type mismatch (<old type> vs. <new type>) with values (<old> vs. <new>) for ...
_MISMATCH = re.compile(r"with values \(.* vs\. (.*)\) for config key: (.*)", re.DOTALL)


def builtin_config(name: str) -> str:
    """Find one of the configs that come with the package.

    Args:
        name: File name below ``configs/``.

    Returns:
        Its path, in an installed package or in a checkout.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"the package has no config {name!r}")


def import_files(files: Sequence[str]) -> None:
    """Import Python files, each once in a process.

    Args:
        files: Paths of files; a file's name is its module's.

    Raises:
        FileNotFoundError: If one does not exist.
        ValueError: If one is no Python file.
    """
    for file in files:
        path = Path(file).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"--import {file!r} does not exist")
        if path.suffix != ".py":
            raise ValueError(f"--import {file!r} is no Python file: its name ends in .py")
        loaded = sys.modules.get(path.stem)
        if loaded is not None and getattr(loaded, "__file__", None) == str(path):
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)


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


def _merge_file(cfg: Any, keys: ConfigKeys, file: str) -> None:
    with _explained(cfg, keys, file):
        cfg.merge_from_file(file)


def _merge_options(cfg: Any, keys: ConfigKeys, opts: Sequence[str]) -> None:
    source = "the command line"
    if len(opts) % 2:
        raise ValueError(f"{source}: the key {opts[-1]} has no value: KEY VALUE")
    for key in opts[::2]:
        _check_key(cfg, key, source)
    with _explained(cfg, keys, source):
        cfg.merge_from_list(list(opts))


def _check_key(cfg: Any, key: str, source: str) -> None:
    flat = flatten_config(cfg)
    if key in flat:
        return
    if any(known.startswith(f"{key}.") for known in flat):
        example = next(known for known in flat if known.startswith(f"{key}."))
        raise ValueError(f"{source}: {key} is a group of keys: set one, such as {example}")
    close = difflib.get_close_matches(key, flat, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"unknown config key {key} in {source}{hint}")


@contextlib.contextmanager
def _explained(cfg: Any, keys: ConfigKeys, source: str) -> Iterator[None]:
    """Turn yacs's errors, of a merge inside, into ones that help."""
    node = cfg
    for name in keys.path.split("."):
        node = node[name]
    try:
        with keys.of_any_type(node):
            yield
    except KeyError as error:
        _check_key(cfg, str(error.args[0]).rpartition(": ")[2], source)
        raise
    except (AssertionError, ValueError) as error:
        mismatch = _MISMATCH.search(str(error))
        if mismatch is None:
            raise ValueError(f"{source}: {error}") from error
        value, key = mismatch.groups()
        legal = keys.describe(key) or KINDS.get(type(flatten_config(cfg).get(key)), "")
        # To yacs a whole number is no float: 1 has to be written 1.0.
        remedy = f"; it must be {legal}, written with its type (1.0, not 1)"
        raise ValueError(
            f"{source}: {value} does not fit {key}{remedy if legal else ''}"
        ) from error


def run_torchreid(cfg: Any, *, resume: bool = False, eval_only: bool = False) -> None:
    """Train or evaluate in torchreid."""
    from selcon_plugin.torchreid_ext.train import run_config

    if eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.test.evaluate = True
    with one_core_left_free() if not cfg.use_gpu and cfg.data.workers else nullcontext():
        run_config(cfg, resume=resume)


def train_config(cfg: Any, *, resume: bool = False) -> None:
    """Train as ``selcon train`` does, in this process.

    Args:
        cfg: Complete config of either host.
        resume: Whether to go on from the last checkpoint in its folder, if there is one.
    """
    (run_torchreid if is_torchreid(cfg) else run_fastreid)(cfg, resume=resume)


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

    from selcon_plugin.engine.run_record import forget_results
    from selcon_plugin.fastreid_ext import SelConTrainer
    from selcon_plugin.fastreid_ext.run_record import results_by_test_set, write_results
    from selcon_plugin.fastreid_ext.trainer import load_trained_model, share_host_log

    default_setup(cfg, argparse.Namespace(eval_only=eval_only, config_file=config_file))
    share_host_log()
    if eval_only:
        if not cfg.DATASETS.TESTS:
            raise ValueError("DATASETS.TESTS is empty: there is nothing to evaluate on")
        results = SelConTrainer.test(cfg, load_trained_model(cfg))
    else:
        trainer = SelConTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        forget_results(cfg.OUTPUT_DIR)
        readers = cfg.MODEL.DEVICE == "cpu" and cfg.DATALOADER.NUM_WORKERS
        threads = one_core_left_free() if readers else nullcontext()
        with threads, trainer.meter.running():
            results = trainer.train()
        write_results(trainer, results)
    if results:
        verify_results(cfg, results_by_test_set(cfg, results))
    return results


@contextlib.contextmanager
def one_core_left_free() -> Iterator[None]:
    """Compute on all cores but one, unless OMP_NUM_THREADS says otherwise.

    The threads of one operation wait for each other: where another process, such as the one
    that reads the images, takes the core of one of them, all come to a near standstill.

    Yields:
        Nothing.
    """
    import torch

    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""``selcon``: train, eval, bench, extract, config, demo and doctor from the command line.

The arguments of ``train`` and ``eval`` are those of FastReID's own train script. Nothing
algorithmic happens here: arguments are read, a config is made, a function is called.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selcon_plugin.engine.checks import (
    flatten_config,
    make_output_folder,
    read_config_file,
)
from selcon_plugin.engine.stopping import RunStopped
from selcon_plugin.options import KINDS

if TYPE_CHECKING:
    from selcon_plugin.engine.settings import ConfigKeys

# The hosts are imported inside the commands: `selcon doctor` must run where they cannot be
# imported, and FastReID reads FASTREID_DATASETS when it is.

logger = logging.getLogger(__name__)

# yacs: Type mismatch (<old type> vs. <new type>) with values (<old> vs. <new>) for ...
_MISMATCH = re.compile(r"with values \(.* vs\. (.*)\) for config key: (.*)", re.DOTALL)

_USAGE = """\
usage: selcon COMMAND [ARGUMENTS]

  train     train without identity labels
  eval      evaluate a checkpoint
  bench     train and evaluate several configs on several seeds; write a table
  report    write what a run learned as one page to look at; compare runs
  cluster   cluster a folder of images: who may be the same person
  adapt     train a network further on a folder of images, and keep what became better
  extract   write the features of a folder of images to a file
  index     keep the features of many images, to search in
  search    find the person of an image in an index
  export    write a trained network as ONNX or TorchScript
  config    say what a config key means, or list all keys
  demo      draw data, train and evaluate, in minutes, on a CPU
  doctor    say what is installed, what works and how to mend the rest

`selcon COMMAND --help` lists the arguments of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        Exit status: 0; 2 for a mistake in arguments, config or data; 143 or 130 for a
        command that SIGTERM or Ctrl-C ended; see the commands for others.

    Raises:
        ValueError: Mistakes are raised and not shown if SELCON_TRACEBACK is set; so are the
            next three.
        FileNotFoundError: See above.
        ImportError: See above.
        FloatingPointError: See above.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "bench": _command("selcon_plugin.bench"),
        "report": _command("selcon_plugin.commands.report"),
        "cluster": _command("selcon_plugin.commands.cluster"),
        "adapt": _command("selcon_plugin.commands.adapt"),
        "extract": _command("selcon_plugin.commands.extract"),
        "index": _command("selcon_plugin.commands.index"),
        "search": _command("selcon_plugin.commands.search"),
        "export": _command("selcon_plugin.commands.export"),
        "config": _command("selcon_plugin.commands.config"),
        "demo": _command("selcon_plugin.demo"),
        "doctor": _command("selcon_plugin.doctor"),
    }
    if not arguments or arguments[0] not in commands:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        stream = sys.stdout if asked_for_help else sys.stderr
        stream.write(_USAGE)
        return 0 if asked_for_help else 2
    try:
        return commands[arguments[0]](arguments[1:])
    except RunStopped as stop:  # which has said how to go on
        return stop.code
    except KeyboardInterrupt:
        sys.stderr.write(f"selcon {arguments[0]}: interrupted\n")
        return 130
    except (ValueError, FileNotFoundError, ImportError, FloatingPointError) as error:
        # Mistakes in what the user gave: the message says what to do, a traceback would
        # hide it. SELCON_TRACEBACK=1 shows where it was raised.
        if os.environ.get("SELCON_TRACEBACK"):
            raise
        message = " ".join(line.strip() for line in str(error).splitlines())
        sys.stderr.write(f"selcon {arguments[0]}: error: {message}\n")
        return 2


def _command(module: str) -> Callable[[list[str]], int]:
    """Return the ``main`` of a module, which is imported when it is called."""

    def run(argv: list[str]) -> int:
        status: int = importlib.import_module(module).main(argv)
        return status

    return run


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


def train_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments of ``selcon train``, for :func:`run`.

    Args:
        argv: Arguments.

    Returns:
        The arguments, with their defaults.
    """
    return _train_parser("train").parse_args(argv)


def _train_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"selcon {prog}",
        description="Arguments as in FastReID's train script, those for a folder, and the "
        "choice of the host.",
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="FastReID or torchreid config"
    )
    parser.add_argument(
        "--host",
        choices=("fastreid", "torchreid"),
        default="",
        help="framework that trains; default: the one whose keys the config has",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR (torchreid: data.save_dir)",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate MODEL.WEIGHTS (torchreid: model.load_weights) only",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="processes on this machine (CPU or GPU)"
    )
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine")
    parser.add_argument(
        "--dist-url", default="auto", help="tcp://host:port at which the machines meet"
    )
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="how long a process waits for another before it gives up; more than the "
        "longest clustering or evaluation takes; default: 30",
    )
    add_folder_arguments(parser)
    add_import_argument(parser)
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        default=[],
        help="config options, for instance SOLVER.MAX_EPOCH 20 OUTPUT_DIR logs/mine",
    )
    return parser


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command take a folder of images, and where their cameras are written."""
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        default="",
        help="any folder of jpg, png, webp or bmp images; needs no labels and no structure",
    )
    parser.add_argument(
        "--camera-pattern",
        metavar="REGEX",
        default="",
        help="finds the camera in a file's path: first group or whole match; default: the "
        "first sub-folder; none: no cameras",
    )


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Let a command take files that register methods, labelers or samplers."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="FILE.py",
        help="Python file to import first, such as one with a method of your own; may be "
        "given several times",
    )


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


def _train(argv: list[str]) -> int:
    return _launch(train_arguments(argv))


def _eval(argv: list[str]) -> int:
    args = _train_parser("eval").parse_args(argv)
    args.eval_only = True
    return _launch(args)


def _launch(args: argparse.Namespace) -> int:
    import_files(args.imports)
    cfg = load_config(
        args.config_file,
        args.opts,
        images=args.images,
        camera_pattern=args.camera_pattern,
        host=args.host,
    )
    if is_torchreid(cfg):
        _run_torchreid(cfg, args)
        return 0
    from selcon_plugin.fastreid_ext.data import check_processes
    from selcon_plugin.fastreid_ext.launch import ProcessFailure, check_launch, launch

    make_output_folder("OUTPUT_DIR", cfg.OUTPUT_DIR)
    check_launch(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    if args.num_gpus > 1 and not args.eval_only:
        # To start processes that all fail takes its time.
        check_processes(cfg, args.num_gpus * args.num_machines)
    try:
        launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            timeout_minutes=args.dist_timeout,
            args=(cfg, args),
        )
    except ProcessFailure as error:
        sys.stderr.write(f"selcon train: error: {error}\n")
        return 1
    return 0


def _run_torchreid(cfg: Any, args: argparse.Namespace) -> None:
    """Train or evaluate in torchreid."""
    from selcon_plugin.torchreid_ext.train import run_config

    if args.num_gpus > 1 or args.num_machines > 1:
        raise ValueError(
            "torchreid trains in one process, on all GPUs that CUDA_VISIBLE_DEVICES shows "
            "it: leave out --num-gpus and --num-machines"
        )
    if args.eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.test.evaluate = True
    with one_core_left_free() if not cfg.use_gpu and cfg.data.workers else nullcontext():
        run_config(cfg, resume=args.resume)


def train_config(cfg: Any, *, resume: bool = False) -> None:
    """Train as ``selcon train`` does, in this process.

    Args:
        cfg: Complete config of either host.
        resume: Whether to go on from the last checkpoint in its folder, if there is one.
    """
    args = _train_parser("train").parse_args(["--resume"] if resume else [])
    (_run_torchreid if is_torchreid(cfg) else run)(cfg, args)


def run(cfg: Any, args: argparse.Namespace) -> Any:
    """Train or evaluate, in one process of possibly several.

    Args:
        cfg: Complete config.
        args: Arguments of ``selcon train``.

    Returns:
        FastReID's results.

    Raises:
        ValueError: If there is nothing to evaluate.
    """
    import_files(args.imports)  # in a process of its own, it has not been done
    from fastreid.engine import default_setup
    from fastreid.evaluation.testing import verify_results

    from selcon_plugin.engine.run_record import forget_results
    from selcon_plugin.fastreid_ext import SelConTrainer
    from selcon_plugin.fastreid_ext.run_record import results_by_test_set, write_results
    from selcon_plugin.fastreid_ext.trainer import load_trained_model, share_host_log

    default_setup(cfg, args)
    share_host_log()
    if args.eval_only:
        if not cfg.DATASETS.TESTS:
            raise ValueError("DATASETS.TESTS is empty: there is nothing to evaluate on")
        results = SelConTrainer.test(cfg, load_trained_model(cfg))
    else:
        trainer = SelConTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
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

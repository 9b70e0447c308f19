"""``selcon``: train, eval, bench, extract, config, demo and doctor from the command line.

The arguments of ``train`` and ``eval`` are those of FastReID's own train script. Nothing
algorithmic happens here: arguments are read, a config is made, a function is called.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from selcon_plugin.engine.checks import make_output_folder
from selcon_plugin.engine.stopping import RunStopped
from selcon_plugin.hosts import (
    import_files,
    is_torchreid,
    load_config,
    run_fastreid,
    run_torchreid,
)

# The hosts are imported inside the commands: `selcon doctor` must run where they cannot be
# imported, and FastReID reads FASTREID_DATASETS when it is.

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


def _train(argv: list[str]) -> int:
    return _launch(_train_parser("train").parse_args(argv))


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
        if args.num_gpus > 1 or args.num_machines > 1:
            raise ValueError(
                "torchreid trains in one process, on all GPUs that CUDA_VISIBLE_DEVICES "
                "shows it: leave out --num-gpus and --num-machines"
            )
        run_torchreid(cfg, resume=args.resume, eval_only=args.eval_only)
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
            partial(
                run_fastreid,
                resume=args.resume,
                eval_only=args.eval_only,
                config_file=args.config_file,
                imports=args.imports,
            ),
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            timeout_minutes=args.dist_timeout,
            args=(cfg,),
        )
    except ProcessFailure as error:
        sys.stderr.write(f"selcon train: error: {error}\n")
        return 1
    return 0

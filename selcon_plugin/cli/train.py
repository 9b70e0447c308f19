"""``selcon train`` and ``selcon eval``: train with a config, or evaluate a checkpoint."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from selcon_plugin.cli.arguments import (
    add_folder_arguments,
    add_hint_argument,
    add_import_argument,
    add_unreadable_argument,
)
from selcon_plugin.cli.parsing import CommandParser, config_file, number, whole_number
from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import Processes, ProcessFailure
from selcon_plugin.config.importing import import_files
from selcon_plugin.engine.console import verbose_output
from selcon_plugin.hosts import get_host, host_names, host_of
from selcon_plugin.options import Interval
from selcon_plugin.workflows.train import default_output, launch


def train_parser(prog: str) -> CommandParser:
    """Build the parser of ``selcon train`` or ``selcon eval``.

    Args:
        prog: Name of the command, ``"train"`` or ``"eval"``.

    Returns:
        The parser.
    """
    parser = CommandParser(
        prog=f"selcon {prog}",
        description="The arguments are those of FastReID's train script, with additional "
        "ones for a folder of images and for the host.",
    )
    parser.add_argument(
        "--config-file",
        type=config_file,
        default="",
        metavar="FILE",
        help="FastReID or torchreid config",
    )
    parser.add_argument(
        "--host",
        choices=host_names(),
        default="",
        help="training framework; default: the one whose keys the config has",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the last checkpoint in OUTPUT_DIR (torchreid: data.save_dir)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start a new run in the folder of an earlier one, whose files are moved to "
        "old-<time> in it",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="only evaluate MODEL.WEIGHTS (torchreid: model.load_weights)",
    )
    parser.add_argument(
        "--num-gpus",
        type=whole_number(),
        default=1,
        help="number of processes on this machine (CPU or GPU)",
    )
    parser.add_argument(
        "--num-machines", type=whole_number(), default=1, help="number of machines"
    )
    parser.add_argument(
        "--machine-rank", type=whole_number(), default=0, help="rank of this machine"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="tcp://host:port of the rendezvous of all machines",
    )
    parser.add_argument(
        "--dist-timeout",
        type=number(Interval(0, above=True)),
        default=30.0,
        metavar="MINUTES",
        help="timeout of collective operations; must exceed the longest clustering or "
        "evaluation; default: 30",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="show the whole log on the terminal, with config, network and the host's "
        "lines; default: the log file has them",
    )
    add_folder_arguments(parser)
    add_hint_argument(parser)
    add_unreadable_argument(parser, default=None)
    add_import_argument(parser)
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        default=[],
        help="config options, for example SOLVER.MAX_EPOCH 20 OUTPUT_DIR logs/mine",
    )
    return parser


def main(argv: list[str]) -> int:
    """Train a network.

    Args:
        argv: Arguments after ``selcon train``.

    Returns:
        Exit status: 0, or 1 if one of several processes failed.
    """
    return _launch(train_parser("train").parse_args(argv))


def evaluate(argv: list[str]) -> int:
    """Evaluate a checkpoint.

    Args:
        argv: Arguments after ``selcon eval``.

    Returns:
        Exit status as for :func:`main`.
    """
    args = train_parser("eval").parse_args(argv)
    args.eval_only = True
    return _launch(args)


def _output_of_images(host: Host, args: argparse.Namespace) -> dict[str, Any]:
    """Return the output folder of a folder of images, unless the user has named one."""
    named = args.config_file or host.run_keys.output in args.opts
    if not args.images or named or args.eval_only:
        return {}
    output = default_output(host, args.images, resume=args.resume, overwrite=args.overwrite)
    return host.overrides(output=output)


def _launch(args: argparse.Namespace) -> int:
    with verbose_output(args.verbose):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    import_files(args.imports)
    host = get_host(args.host or host_of(args.config_file))
    ratio = args.max_unreadable_ratio
    given = {} if ratio is None else {"max_unreadable_ratio": ratio}
    hint = args.images_per_person
    clustering = {} if hint is None else {"images_per_person": hint}
    cfg = host.load_config(
        args.config_file,
        args.opts,
        overrides={
            **_output_of_images(host, args),
            **host.overrides(options=given, clustering=clustering),
        },
        images=args.images,
        camera_pattern=args.camera_pattern,
    )
    processes = Processes(
        per_machine=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        meeting_point=args.dist_url,
        timeout_minutes=args.dist_timeout,
    )
    try:
        launch(
            host,
            cfg,
            processes,
            eval_only=args.eval_only,
            resume=args.resume,
            overwrite=args.overwrite,
            source=args.config_file,
            imports=args.imports,
        )
    except ProcessFailure as error:
        sys.stderr.write(f"selcon train: error: {error}\n")
        return 1
    return 0

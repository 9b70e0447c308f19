"""``selcon demo``: train on synthetic persons without labels in minutes on a CPU."""

from __future__ import annotations

import argparse

from selcon_plugin.cli.parsing import CommandParser, whole_number
from selcon_plugin.engine.stopping import RunStopped
from selcon_plugin.workflows.demo import run_demo
from selcon_plugin.workflows.terminal import echo


def main(argv: list[str]) -> int:
    """Run the demo.

    Args:
        argv: Arguments after ``selcon demo``.

    Returns:
        Exit status: 0, or 130 after Ctrl-C and 143 after SIGTERM.
    """
    args = _parser().parse_args(argv)
    try:
        run_demo(
            args.output,
            epochs=args.epochs,
            fresh=args.fresh,
            data_root=args.data_root,
            options=args.opts,
        )
    except (KeyboardInterrupt, RunStopped) as stop:
        echo("\nStopped. The same command resumes the run.")
        return stop.code if isinstance(stop, RunStopped) else 130
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon demo",
        description="Render synthetic persons in several cameras, train on them without "
        "identity labels, and report the accuracy before and after. Repeat the command to "
        "resume an interrupted run.",
    )
    parser.add_argument(
        "--output",
        default="logs/demo",
        metavar="FOLDER",
        help="folder of the run; default: logs/demo",
    )
    parser.add_argument(
        "--epochs", type=whole_number(1), metavar="N", help="number of epochs to train"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete the run in FOLDER and start over"
    )
    parser.add_argument(
        "--data-root",
        default="",
        metavar="FOLDER",
        help="folder for the rendered data; default: FASTREID_DATASETS, else ./datasets",
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="config options"
    )
    return parser

"""``selcon bench``: compare several configs over several seeds in one table."""

from __future__ import annotations

import argparse
import itertools
import shlex

from selcon_plugin.cli.arguments import add_import_argument
from selcon_plugin.cli.parsing import CommandParser, whole_number
from selcon_plugin.config.importing import import_files
from selcon_plugin.workflows.bench import BenchTerminated, run_bench
from selcon_plugin.workflows.terminal import echo


def main(argv: list[str]) -> int:
    """Run the bench.

    Args:
        argv: Arguments after ``selcon bench``.

    Returns:
        Exit status: 0; 1 if a run failed; 130 (Ctrl-C) or 143 (SIGTERM) if the bench was
        stopped.

    Raises:
        ValueError: If an argument is wrong.
    """
    args = _parser().parse_args(argv)
    # argparse reads options that directly follow the files as files.
    files = list(itertools.takewhile(_is_config_file, args.configs))
    options = args.configs[len(files) :] + args.opts
    if not files:
        raise ValueError(f"--configs needs .yml files, got {options[0]!r}")
    import_files(args.imports)
    try:
        outcomes = run_bench(
            files,
            args.output,
            seeds=args.seeds,
            dataset=args.dataset,
            epochs=args.epochs,
            options=options,
            imports=args.imports,
            supervised=args.supervised,
            command=shlex.join(["selcon", "bench", *argv]),
        )
    except KeyboardInterrupt as stop:
        echo("\nStopped. The same command resumes the bench.")
        return 143 if isinstance(stop, BenchTerminated) else 130
    return int(any(outcome.error for outcome in outcomes))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon bench",
        description="Train and evaluate each config with each seed, and write a table "
        "(Markdown, CSV, JSON, LaTeX). Repeat the command to resume an interrupted bench.",
    )
    parser.add_argument(
        "--configs",
        nargs="+",
        required=True,
        metavar="FILE.yml",
        help="config files to compare",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(1),
        default=3,
        metavar="N",
        help="use the seeds 0..N-1; default: 3",
    )
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="data set for training and test in all configs; default: as configured",
    )
    parser.add_argument(
        "--epochs",
        type=whole_number(1),
        metavar="N",
        help="epochs to train in all configs; default: as configured",
    )
    parser.add_argument(
        "--output",
        default="logs/bench",
        metavar="FOLDER",
        help="folder for the runs and the table; default: logs/bench",
    )
    parser.add_argument(
        "--supervised",
        action="store_true",
        help="also train the host's own baseline with identities, as a reference row, with "
        "the network and the budget of the host's first config",
    )
    add_import_argument(parser)
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        help="config options; each applies to all configs of the host that has this key",
    )
    return parser


def _is_config_file(argument: str) -> bool:
    return argument.endswith((".yml", ".yaml"))

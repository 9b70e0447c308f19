"""Run the complete study on Market-1501: choose settings, report, correlate, tables.

    python tools/benchmark/market1501.py all --protocol gpu --data datasets
    python tools/benchmark/market1501.py split choose correlate tables --protocol cpu \
        --data datasets --train-identities 150 --only methods --time-budget 480

``--data`` contains the folder Market-1501-v15.09.15. A stopped or killed study resumes with
the same command: finished runs are only read, and the current one resumes from its last
checkpoint. docs/benchmarks/market1501.md describes the phases.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from market_study.protocols import PROTOCOLS, parse_options
from market_study.runs import Budget, BudgetSpentError
from market_study.split import make_split
from market_study.study import PHASES, Study

SPLIT_PHASE = "split"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the requested phases.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0 after success, 1 if a configuration has no finished run, 2 for invalid arguments,
        75 when the time budget is spent, 130 when stopped.
    """
    args = _parse(argv)
    # Ctrl-C and SIGTERM both end the current run with a checkpoint.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        failed = _run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"market1501: error: {error}\n")
        return 2
    except BudgetSpentError:
        print("The time budget is spent. The same command resumes the study.")
        return 75
    except KeyboardInterrupt:
        print("Stopped. The same command resumes the study.")
        return 130
    if failed:
        print(f"Without a finished run: {', '.join(failed)}; see console.txt in its folder")
    return int(bool(failed))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="market1501", description="The study on Market-1501."
    )
    phases = [SPLIT_PHASE, *PHASES]
    parser.add_argument(
        "phases",
        nargs="+",
        choices=[*phases, "all"],
        metavar="PHASE",
        help=f"{', '.join(phases)}, or all",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="gpu")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="contains Market-1501-v15.09.15",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: logs/market1501_PROTOCOL"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="METHOD, METHOD/GROUP of changes, METHOD/GROUP/LEVEL, METHOD/ without "
        "changes, or methods for all methods without changes",
    )
    parser.add_argument(
        "--validation-identities", type=int, default=100, metavar="N", help="default: 100"
    )
    parser.add_argument(
        "--train-identities",
        type=int,
        default=0,
        metavar="N",
        help="number of training identities, also in the report; default: while choosing "
        "all that are not held out, in the report all",
    )
    parser.add_argument("--split-seed", type=int, default=0, metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: the configs'")
    parser.add_argument(
        "--choose-seeds",
        type=int,
        default=1,
        metavar="N",
        help="seeds of each run while choosing; default: 1",
    )
    parser.add_argument(
        "--report-seeds", type=int, default=3, metavar="N", help="default: 3"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="rounds of changes; default: 1"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.5,
        metavar="MAP",
        help="gain in validation mAP that counts; default: 0.5",
    )
    parser.add_argument(
        "--time-budget", type=float, metavar="MINUTES", help="stop then; default: never"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config options of all runs",
    )
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> list[str]:
    protocol = PROTOCOLS[args.protocol].with_options(parse_options(args.options))
    if args.epochs is not None:
        protocol = protocol.with_options({"SOLVER.MAX_EPOCH": args.epochs})
    study = Study(
        protocol=protocol.only(args.only),
        data=args.data.expanduser().resolve(),
        output=(args.output or Path(f"logs/market1501_{args.protocol}")).resolve(),
        choose_seeds=args.choose_seeds,
        report_seeds=args.report_seeds,
        rounds=args.rounds,
        margin=args.margin,
        budget=Budget(args.time_budget),
    )
    split = make_split(
        study.data,
        study.validation_root,
        num_validation=args.validation_identities,
        num_train=args.train_identities,
        seed=args.split_seed,
    )
    if args.train_identities:
        study = replace(study, train_subset=split.train)
    print(f"Validation split: {split.counts()}", flush=True)
    wanted = PHASES if "all" in args.phases else args.phases
    for phase in PHASES:
        if phase in wanted:
            print(f"Phase: {phase}", flush=True)
            getattr(study, phase)()
    return study.failed()


if __name__ == "__main__":
    sys.exit(main())

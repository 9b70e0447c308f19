r"""Measure the clustering of folders of many shapes, against baselines and their oracles.

A person's folder may hold two images of each person or forty, from one camera or six. This
tool draws folders of 24 shapes (``folder_study/drawing.py``) from the images of Market-1501
and clusters each by this plugin's defaults and by the baselines. Folders to choose settings
come from the training identities, those to report from the test identities. Rows are
appended to a JSONL file as they come; the same command continues where it was stopped.

Extract the features of each part first, and name them by network::

    selcon extract --images Market-1501-v15.09.15/bounding_box_train \
        --camera-pattern '_c(\d)' --weights osnet.pth --backbone osnet_x0_25 \
        --output features/train.npz
    python tools/benchmark/folders.py --network osnet --half choose \
        --features features/train.npz --output folders.jsonl
    python tools/benchmark/folders.py --network osnet --half report \
        --features features/query.npz features/test.npz --output folders.jsonl
    python tools/benchmark/folders.py --table --output folders.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from folder_study.clusterings import calibration_error, clusterings
from folder_study.drawing import SPECS, Pool, draw

_SEEDS = {"choose": 0, "report": 1000}
_METHODS = (
    "selcon",
    "selcon, hint",
    "selcon, DBSCAN",
    "selcon, HDBSCAN",
    "DBSCAN, published sizes",
    "HDBSCAN, scikit-learn's defaults",
    "HDBSCAN",
    "average linkage",
    "DBSCAN, cosine",
)
_BASELINES = (
    "HDBSCAN, scikit-learn's defaults",
    "HDBSCAN",
    "average linkage",
    "DBSCAN, cosine",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure folders, or print the table.

    Args:
        argv: Arguments; those of the command line by default.

    Returns:
        Exit status 0.
    """
    parser = argparse.ArgumentParser(description="Measure the clustering of many folders.")
    parser.add_argument("--features", nargs="+", type=Path, default=[], metavar="FILE.npz")
    parser.add_argument("--network", default="network", help="name in the table")
    parser.add_argument("--half", choices=sorted(_SEEDS), default="choose")
    parser.add_argument("--output", type=Path, default=Path("folders.jsonl"))
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the shapes, from 0")
    parser.add_argument("--table", action="store_true", help="print the table, and end")
    args = parser.parse_args(argv)
    if not args.table:
        if not args.features:
            parser.error("give --features FILE.npz, or --table")
        measure(args)
    sys.stdout.write(table(read(args.output)))
    return 0


def measure(args: argparse.Namespace) -> None:
    """Measure the folders of one network and half that the output does not hold yet."""
    known = {(row["network"], row["half"], row["folder"]) for row in read(args.output)}
    pool = Pool.read(args.features)
    for number, spec in enumerate(SPECS):
        if (args.network, args.half, spec.name) in known:
            continue
        if args.only is not None and number not in args.only:
            continue
        folder = draw(pool, spec, _SEEDS[args.half] + number)
        started = time.perf_counter()
        found = clusterings(pool.features[folder.rows], folder.camids, folder.identities)
        row = {
            "network": args.network,
            "half": args.half,
            "folder": spec.name,
            "images": len(folder.rows),
            "people": int(folder.identities.max()) + 1,
            "seconds": round(time.perf_counter() - started, 1),
            "scores": found,
        }
        with args.output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        own, best = found["selcon"]["ami"], max(found[name]["ami"] for name in _BASELINES)
        sys.stderr.write(
            f"{args.network} {args.half} {spec.name}: {own:.3f} ({best:.3f})\n"
        )


def read(file: Path) -> list[dict[str, Any]]:
    """Read the rows that were measured; none if there is no file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means over folders as a Markdown table, by network and half."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["half"], row["network"]].append(row)
    lines = ["| half, network | method | AMI | F1 |", "| --- | --- | --- | --- |"]
    for (half, network), group in sorted(groups.items()):
        for method in _METHODS:
            means = [
                np.mean([r["scores"][method][m] for r in group]) for m in ("ami", "f1")
            ]
            lines.append(
                f"| {half}, {network} | {method} | {means[0]:.3f} | {means[1]:.3f} |"
            )
        margin = [_margin(row) for row in group]
        ratio = [
            row["scores"]["selcon"]["f1"] / row["scores"]["selcon, oracle"]["f1"]
            for row in group
        ]
        lines.append(
            f"\n{half}, {network}, {len(group)} folders: AMI minus the best baseline of "
            f"each folder, mean {np.mean(margin):+.3f}, worst {min(margin):+.3f}; F1 over "
            f"its oracle, mean {np.mean(ratio):.3f}"
        )
        for method in ("selcon", "selcon, hint"):
            bins = [row["scores"][method]["calibration"] for row in group]
            error = calibration_error(bins)
            lines.append(f"{method}: expected calibration error {error:.3f}")
        lines.append("")
    return "\n".join(lines) + "\n"


def _margin(row: dict[str, Any]) -> float:
    scores = row["scores"]
    best = max(scores[name]["ami"] for name in _BASELINES)
    return float(scores["selcon"]["ami"] - best)


if __name__ == "__main__":
    raise SystemExit(main())

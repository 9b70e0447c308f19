"""Adapt an OSNet trained on MSMT17 to Market-1501 without using its labels.

The script trains on Market-1501's 12,936 training images, and evaluates on its official
test set before and after. Test identities are used only for that; the checkpoint is chosen
by the label-free quality of the training images. After an interruption, the same command
resumes::

    python tools/benchmark/adapt_market1501.py --market Market-1501-v15.09.15 \
        --weights osnet_x0_25_msmt17.pth --output logs/adapt_market1501
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.runs.results import describe_device
from selcon_plugin.workflows.adapt import AdaptSettings, adapt

# Market-1501's file names: identity and camera. Identity -1 is junk, which is ignored.
_NAME = re.compile(r"(-?\d+)_c(\d)")
_CAMERA_PATTERN = r"_c(\d)"


def main() -> None:
    """Evaluate, adapt, evaluate again, and print a table."""
    args = _parse()
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the training process
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    before = _evaluated(
        output / "before.json", args.market, args.weights, args.backbone, args.batch_size
    )
    settings = AdaptSettings(
        args.weights,
        str(Path(args.market, "bounding_box_train")),
        backbone=args.backbone,
        method=args.method,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        camera_pattern=_CAMERA_PATTERN,
        batch_size=args.batch_size,
        options=("selcon.iters_per_epoch", str(args.iterations)),
    )
    started = time.perf_counter()
    result = adapt(settings, output / "adapt", echo=_echo)
    minutes = (time.perf_counter() - started) / 60
    after = _evaluated(output / "after.json", args.market, result.file, "", args.batch_size)
    _echo(
        f"Adapted in {minutes:.0f} min (this part), {describe_device(torch.device('cpu'))}"
    )
    _echo("| network | label-free quality | mAP | Rank-1 |\n| --- | --- | --- | --- |")
    name = Path(args.weights).stem
    for row, candidate, found in (
        (f"{name}, before", result.before, before),
        (
            f"adapted, best of {args.epochs} epochs: {result.best.epochs}",
            result.best,
            after,
        ),
    ):
        _echo(
            f"| {row} | {candidate.value:.3f} | {found['mAP']:.1f} "
            f"| {found['Rank-1']:.1f} |"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--market", required=True, help="Market-1501-v15.09.15")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--backbone", default="osnet_x0_25")
    parser.add_argument("--method", default="SelConCluster")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=150, help="steps of an epoch")
    parser.add_argument("--learning-rate", type=float, default=3.5e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _echo(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _evaluated(
    file: Path, market: str, weights: str | Path, backbone: str, batch_size: int
) -> dict[str, float]:
    """Evaluate a network, unless an earlier part of the run did."""
    if file.exists():
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found
    embedder = Embedder.from_checkpoint(weights, backbone=backbone)
    query = _embed(embedder, Path(market, "query"), batch_size)
    gallery = _embed(embedder, Path(market, "bounding_box_test"), batch_size)
    distance = 1.0 - query[0] @ gallery[0].T
    cmc, average_precision = import_torchreid().metrics.evaluate_rank(
        distance, query[1], gallery[1], query[2], gallery[2], use_cython=False
    )
    found = {"mAP": 100 * float(average_precision), "Rank-1": 100 * float(cmc[0])}
    _echo(f"{weights}: mAP {found['mAP']:.1f}, Rank-1 {found['Rank-1']:.1f}")
    write_atomically(json.dumps(found), file)
    return found


def _embed(embedder: Embedder, folder: Path, batch_size: int) -> tuple[Any, Any, Any]:
    """Return features, identities and cameras of a folder without junk images."""
    files, pids, camids = [], [], []
    for file in sorted(folder.glob("*.jpg")):
        match = _NAME.match(file.name)
        if match and int(match[1]) >= 0:
            files.append(file)
            pids.append(int(match[1]))
            camids.append(int(match[2]))
    features = embedder(files, batch_size=batch_size)
    return features, np.array(pids), np.array(camids)


if __name__ == "__main__":
    main()

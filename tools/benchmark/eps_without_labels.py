"""Evaluate unsupervised selection of DBSCAN's eps on data with known identities.

The script clusters the features of each file at every eps of the grid of ``eps: auto``. It
prints the adjusted mutual information (AMI) with the identities, with each outlier as a
singleton cluster: at the best eps by the identities, and the loss of each label-free rule
and of fixed values relative to it.

    selcon extract --images bounding_box_train --weights RUN/model_final.pth \
        --output features/run.npz
    python tools/benchmark/eps_without_labels.py features/*.npz
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from selcon_plugin.clustering import dbscan_labels, jaccard_distance
from selcon_plugin.clustering.auto_eps import EPS_GRID, EpsTrial, best_trial, try_eps
from selcon_plugin.clustering.pseudo_labels import outliers_as_singletons
from selcon_plugin.clustering.quality import adjusted_mutual_info

K1, K2, MIN_SAMPLES = 30, 6, 4  # the published settings
FIXED = (0.4, 0.5, 0.6, 0.7)

Numbers = NDArray[np.int64]
Choice = Callable[[Sequence[EpsTrial]], EpsTrial | None]


def _largest(score: Callable[[EpsTrial], float]) -> Choice:
    return lambda trials: max(trials, key=score, default=None)


def _nearest(eps: float, trials: Sequence[EpsTrial]) -> EpsTrial | None:
    return min(trials, key=lambda trial: abs(trial.eps - eps), default=None)


RULES: Mapping[str, Choice] = {
    "auto": best_trial,
    "silhouette": _largest(lambda trial: trial.silhouette),
    "stability": _largest(lambda trial: trial.stability),
    "silhouette x stability": _largest(lambda trial: trial.silhouette * trial.stability),
    **{f"eps {eps:g}": partial(_nearest, eps) for eps in FIXED},
}


def read_features(file: Path, *patterns: str) -> tuple[torch.Tensor, list[Numbers]]:
    """Read features of images, and the labels in their file names.

    Args:
        file: File written by ``selcon extract``.
        *patterns: Regular expressions; the first group of each is the identity, or the
            camera, in a file name.

    Returns:
        Unit features ``(M, C)``, and for each pattern the numbered labels, ``(M,)``.

    Raises:
        ValueError: If a file name does not match a pattern.
    """
    with np.load(file) as content:
        names = [Path(path).name for path in content["paths"]]
        features = torch.from_numpy(content["features"])
    labels = []
    for pattern in patterns:
        found = [re.search(pattern, name) for name in names]
        if None in found:
            raise ValueError(
                f"{file}: {names[found.index(None)]} does not match {pattern!r}: give the "
                "pattern of your file names"
            )
        labels.append(np.unique([m[1] for m in found if m], return_inverse=True)[1])
    return torch.nn.functional.normalize(features, dim=1), labels


def compare(features: torch.Tensor, identities: Numbers) -> dict[str, float]:
    """Measure the loss of each rule for choosing eps.

    Args:
        features: Unit vectors ``(M, C)``.
        identities: Identity of each image, ``(M,)``.

    Returns:
        The largest AMI as ``"best"``, its ``"eps"``, and for each of :data:`RULES` the
        difference of its AMI to the largest.

    Raises:
        ValueError: If too few images have neighbors at any eps.
    """
    distance = jaccard_distance(features, k1=K1, k2=K2, max_distance=EPS_GRID[-1])
    trials = try_eps(
        distance,
        lambda eps: dbscan_labels(distance, eps, MIN_SAMPLES),
        MIN_SAMPLES,
    )
    if not trials:
        raise ValueError(f"no eps up to {EPS_GRID[-1]} gives clusters of these features")
    ami = {
        trial.eps: adjusted_mutual_info(outliers_as_singletons(trial.labels), identities)
        for trial in trials
    }
    eps = max(ami, key=ami.__getitem__)
    losses = {}
    for name, choose in RULES.items():
        chosen = choose(trials)
        losses[name] = ami[eps] - (ami[chosen.eps] if chosen else 0.0)
    return {"best": ami[eps], "eps": eps, **losses}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Format the results in Markdown, with mean and largest loss of each rule."""
    lines = [
        f"| features | best AMI | at eps | {' | '.join(RULES)} |",
        "| --- " * (3 + len(RULES)) + "|",
    ]
    for name, row in rows.items():
        losses = " | ".join(f"{row[rule]:.3f}" for rule in RULES)
        lines.append(f"| {name} | {row['best']:.3f} | {row['eps']:g} | {losses} |")
    for title, of_all in (("mean loss", statistics.fmean), ("largest loss", max)):
        losses = " | ".join(
            f"{of_all([r[rule] for r in rows.values()]):.3f}" for rule in RULES
        )
        lines.append(f"| {title} | | | {losses} |")
    return "\n".join(lines)


def features_parser(description: str) -> argparse.ArgumentParser:
    """Create a parser for files of features with identities in the image names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("features", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument(
        "--identity-pattern",
        default=r"^(\d+)_c",
        metavar="REGEX",
        help="its first group is the identity in a file name; default: Market-1501's",
    )
    return parser


def main() -> None:
    """Measure and print the table."""
    parser = features_parser("Compare rules for the unsupervised selection of eps.")
    args = parser.parse_args()
    rows = {}
    for file in args.features:
        try:
            features, (identities,) = read_features(file, args.identity_pattern)
        except (ValueError, OSError, KeyError) as error:
            parser.error(str(error))
        rows[file.stem] = compare(features, identities)
    print(table(rows))


if __name__ == "__main__":
    main()

"""How well DBSCAN's eps is found without labels, on features of people who are known.

Clusters each file's features at every eps of the grid of ``eps: auto``. Printed is the
adjusted mutual information (AMI) with the identities, every outlier a cluster of its own:
at the best eps, told by the identities, and what is lost to it by each way to choose
without them and by fixed values.

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


WAYS: Mapping[str, Choice] = {
    "auto": best_trial,
    "silhouette": _largest(lambda trial: trial.silhouette),
    "stability": _largest(lambda trial: trial.stability),
    "silhouette x stability": _largest(lambda trial: trial.silhouette * trial.stability),
    **{f"eps {eps:g}": partial(_nearest, eps) for eps in FIXED},
}


def read_features(file: Path, *patterns: str) -> tuple[torch.Tensor, list[Numbers]]:
    """Read features of images, and what the images' names tell, such as who is on them.

    Args:
        file: As ``selcon extract`` writes.
        *patterns: The first group of each is the identity, or the camera, in a name.

    Returns:
        Unit features ``(M, C)``, and for each pattern what it found, numbered, ``(M,)``.

    Raises:
        ValueError: If a pattern is not in a name.
    """
    with np.load(file) as content:
        names = [Path(path).name for path in content["paths"]]
        features = torch.from_numpy(content["features"])
    told = []
    for pattern in patterns:
        found = [re.search(pattern, name) for name in names]
        if None in found:
            raise ValueError(
                f"{file}: {names[found.index(None)]} does not match {pattern!r}: give the "
                "pattern of your file names"
            )
        told.append(np.unique([m[1] for m in found if m], return_inverse=True)[1])
    return torch.nn.functional.normalize(features, dim=1), told


def compare(features: torch.Tensor, identities: Numbers) -> dict[str, float]:
    """Measure what each way to choose eps loses.

    Args:
        features: Unit vectors ``(M, C)``.
        identities: Identity of each, ``(M,)``.

    Returns:
        The largest AMI as ``"best"``, its ``"eps"``, and for each of :data:`WAYS` the AMI
        it loses to that.

    Raises:
        ValueError: If hardly any image has neighbors at any eps.
    """
    distance = jaccard_distance(features, k1=K1, k2=K2, max_distance=EPS_GRID[-1])
    trials = try_eps(
        distance,
        lambda eps: dbscan_labels(distance, eps, MIN_SAMPLES),
        MIN_SAMPLES,
    )
    if not trials:
        raise ValueError(f"no eps up to {EPS_GRID[-1]} makes clusters of these features")
    ami = {
        trial.eps: adjusted_mutual_info(outliers_as_singletons(trial.labels), identities)
        for trial in trials
    }
    eps = max(ami, key=ami.__getitem__)
    losses = {}
    for name, choose in WAYS.items():
        chosen = choose(trials)
        losses[name] = ami[eps] - (ami[chosen.eps] if chosen else 0.0)
    return {"best": ami[eps], "eps": eps, **losses}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out the figures in Markdown, with mean and largest loss of each way."""
    lines = [
        f"| features | best AMI | at eps | {' | '.join(WAYS)} |",
        "| --- " * (3 + len(WAYS)) + "|",
    ]
    for name, row in rows.items():
        losses = " | ".join(f"{row[way]:.3f}" for way in WAYS)
        lines.append(f"| {name} | {row['best']:.3f} | {row['eps']:g} | {losses} |")
    for title, of_all in (("mean loss", statistics.fmean), ("largest loss", max)):
        losses = " | ".join(
            f"{of_all([r[way] for r in rows.values()]):.3f}" for way in WAYS
        )
        lines.append(f"| {title} | | | {losses} |")
    return "\n".join(lines)


def features_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser of files of features whose names tell who is on the images."""
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
    """Measure and print."""
    parser = features_parser("Ways to choose eps without labels.")
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

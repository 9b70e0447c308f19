"""Measure the gain of per-camera feature centering on data with known identities.

The script clusters the features of each file with and without ``CENTER_CAMERAS``, at the
eps selected by ``eps: auto`` and at the best eps by the identities. It prints the adjusted
mutual information (AMI) with the identities, with each outlier as a singleton cluster.

    selcon extract --images bounding_box_train --weights RUN/model_final.pth \
        --output features/run.npz
    python tools/benchmark/camera_centering.py features/*.npz
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from eps_without_labels import Numbers, compare, features_parser, read_features
from selcon_plugin.clustering.camera_centering import center_cameras


def gains(features: torch.Tensor, camids: torch.Tensor, identities: Numbers) -> list[float]:
    """Measure the AMI with and without centering, at eps auto and at the best eps.

    Args:
        features: Unit vectors ``(M, C)``.
        camids: Camera of each image, ``(M,)``.
        identities: Identity of each image, ``(M,)``.

    Returns:
        AMI at eps auto without and with centering, then both at the best eps.
    """
    plain = compare(features, identities)
    centered = compare(center_cameras(features, camids), identities)
    best = [plain["best"], centered["best"]]
    return [best[0] - plain["auto"], best[1] - centered["auto"], *best]


def table(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Format the AMI values in Markdown, with mean and range of the gains."""
    lines = [
        "| features | auto eps | centered | gain | best eps | centered | gain |",
        "| --- " * 7 + "|",
    ]
    for name, (auto, auto_centered, best, best_centered) in rows:
        lines.append(
            f"| {name} | {auto:.3f} | {auto_centered:.3f} | {auto_centered - auto:+.3f} | "
            f"{best:.3f} | {best_centered:.3f} | {best_centered - best:+.3f} |"
        )
    for title, of_all in (("mean", statistics.fmean), ("least", min), ("most", max)):
        found = [of_all([row[i + 1] - row[i] for _, row in rows]) for i in (0, 2)]
        lines.append(f"| {title} | | | {found[0]:+.3f} | | | {found[1]:+.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = features_parser("Measure the gain of per-camera feature centering.")
    parser.add_argument(
        "--camera-pattern",
        default=r"_c(\d+)",
        metavar="REGEX",
        help="its first group is the camera in a file name; default: Market-1501's",
    )
    args = parser.parse_args()
    rows = []
    for file in args.features:
        try:
            features, (identities, cameras) = read_features(
                file, args.identity_pattern, args.camera_pattern
            )
        except (ValueError, OSError, KeyError) as error:
            parser.error(str(error))
        rows.append((file.stem, gains(features, torch.from_numpy(cameras), identities)))
    print(table(rows))


if __name__ == "__main__":
    main()

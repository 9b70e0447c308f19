"""``selcon cluster``: cluster a folder of images by pseudo identity."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from selcon_plugin.cli.arguments import (
    add_folder_arguments,
    add_hint_argument,
    add_import_argument,
    add_network_arguments,
    add_reading_arguments,
    add_unreadable_argument,
    check_network_arguments,
    load_embedder,
    network_key,
)
from selcon_plugin.cli.parsing import CommandParser, whole_number
from selcon_plugin.clustering import labeler_names, labeler_options
from selcon_plugin.config.checks import check_name
from selcon_plugin.config.importing import import_files
from selcon_plugin.config.loading import pairs_of, read_option
from selcon_plugin.values import from_command_line, listed
from selcon_plugin.workflows.cluster_folder import cluster_folder
from selcon_plugin.workflows.folder_clusters import chosen_labeler
from selcon_plugin.workflows.terminal import echo

_HINT = "images_per_person"


def main(argv: list[str]) -> int:
    """Cluster a folder of images.

    Args:
        argv: Arguments after ``selcon cluster``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If an argument is wrong, or the memory does not suffice.
            ``FileNotFoundError`` if a file or folder does not exist.
    """
    args = _parser().parse_args(argv)
    if not args.images:
        raise ValueError("cluster needs --images FOLDER")
    check_network_arguments(args)
    import_files(args.imports)
    pairs = _option_pairs(args)
    labeler = chosen_labeler(args.labeler, dict(pairs))
    cluster_folder(
        partial(load_embedder, args),
        args.images,
        args.output,
        network_key=network_key(args),
        labeler=labeler,
        options=_labeler_options(labeler, pairs),
        camera_pattern=args.camera_pattern,
        links=args.links,
        contact_sheet_rows=args.contact_sheet,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
        max_unreadable_ratio=args.max_unreadable_ratio,
        echo=echo,
    )
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon cluster",
        description="Cluster a folder of images by pseudo identity, and write "
        "clusters.csv with the columns image, cluster, confidence, camera, cohesion. "
        "Features are saved as well, so the same command with other options is fast.",
    )
    add_network_arguments(parser)
    add_reading_arguments(parser)
    add_folder_arguments(parser)
    add_hint_argument(parser)
    add_unreadable_argument(parser)
    add_import_argument(parser)
    parser.add_argument(
        "--output",
        default="clusters",
        metavar="DIR",
        help="folder for clusters.csv and features.npz; default: clusters",
    )
    parser.add_argument(
        "--eps",
        metavar="X",
        help="largest Jaccard distance of neighbors in DBSCAN, or auto for unsupervised "
        "selection",
    )
    parser.add_argument(
        "--labeler",
        default="",
        help=f"clustering method: {', '.join(labeler_names())}; default: Agglomerative, or "
        "DBSCAN with one of its own options",
    )
    parser.add_argument(
        "--links",
        action="store_true",
        help="create a folder of links to its images for each cluster",
    )
    parser.add_argument(
        "--contact-sheet",
        type=whole_number(),
        nargs="?",
        const=20,
        default=0,
        metavar="N",
        help="draw the N largest clusters in contact_sheet.jpg; 20 if N is omitted",
    )
    parser.add_argument(
        "opts",
        metavar="NAME VALUE",
        nargs=argparse.REMAINDER,
        default=[],
        help="options of the labeler, for example threshold 0.7 min_cluster_size 3",
    )
    return parser


def _option_pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the options of the labeler as name and text, in the order they are read."""
    pairs = pairs_of(args.opts)
    if args.eps is not None:  # an empty text, of an unset variable, is no number
        pairs.append(("eps", args.eps))
    if args.images_per_person is not None:
        pairs.append((_HINT, f"{args.images_per_person:g}"))
    return pairs


def _labeler_options(labeler: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Parse the options of the labeler; it chooses others for itself."""
    check_name("--labeler", labeler, labeler_names())
    known = labeler_options(labeler)
    if _HINT in dict(pairs) and _HINT not in known:
        takers = [name for name in labeler_names() if _HINT in labeler_options(name)]
        raise ValueError(
            f"--images-per-person has no effect on --labeler {labeler}: choose "
            f"{listed(takers)}"
        )
    options: dict[str, Any] = {}
    for name, text in pairs:
        check_name(f"option of the labeler {labeler}", name, known)
        value = read_option(known[name], from_command_line(text), name)
        if options.setdefault(name, value) != value:
            raise ValueError(
                f"{name} is given twice, {options[name]} and {value}: leave one of them"
            )
    return options

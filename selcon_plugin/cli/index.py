"""``selcon index``: build and update an index of features for ``selcon search``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from selcon_plugin.cli.arguments import (
    add_batch_size_argument,
    add_device_argument,
    add_network_arguments,
    add_options,
    add_unreadable_argument,
    network_source,
)
from selcon_plugin.cli.parsing import CommandParser
from selcon_plugin.datasets.reading import describe_faults
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.retrieval import ImageEmbedder, Index, NetworkSource
from selcon_plugin.retrieval.store import MANIFEST


def main(argv: list[str]) -> int:
    """Create an index, add images to it or remove images.

    Args:
        argv: Arguments after ``selcon index``.

    Returns:
        Exit status: 0.
    """
    args = _parser().parse_args(argv)
    if args.remove is not None:
        index = Index.open(args.index)
        removed = index.remove(args.remove)
        sys.stdout.write(f"{removed} images removed\n")
    else:
        index, embedder = _index_and_network(args)
        added = index.add(
            args.images or args.add,
            embedder,
            camera_pattern=args.camera_pattern,
            batch_size=args.batch_size,
            max_unreadable_ratio=args.max_unreadable_ratio,
            show_progress=sys.stderr.isatty(),
        )
        if added.unreadable:
            sys.stderr.write(
                f"{len(added.unreadable)} images could not be read and are left out:\n"
                f"{describe_faults(added.unreadable)}\n"
            )
        sys.stdout.write(f"{added}\n")
    sys.stdout.write(f"{args.index}: {index}\n")
    return 0


def _index_and_network(args: argparse.Namespace) -> tuple[Index, ImageEmbedder]:
    """Open the index, or create it if --images is given and it does not exist."""
    source = network_source(args)
    if args.add or Path(args.index, MANIFEST).is_file():
        index = Index.open(args.index)
        embedder = _source_of(index, source).load(args.device)
        return index, embedder
    if source is None:
        raise ValueError("a new index needs its network: --weights FILE or --onnx FILE")
    check_output_folder("--output", os.path.expanduser(args.index))
    embedder = source.load(args.device)
    index = Index.create(
        args.index, embedder, source=source, fp16=args.fp16, kind=args.search
    )
    return index, embedder


def _source_of(index: Index, given: NetworkSource | None) -> NetworkSource:
    source = given or index.source
    if source is None:
        raise ValueError("the index does not record its network: give --weights")
    return source


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon index",
        description="Store the features of many images on disk for selcon search. Repeat "
        "the command to update the index, or to resume after an interruption: new and "
        "changed images are added, files that are gone are removed.",
    )
    parser.add_argument(
        "--output", "--index", dest="index", required=True, metavar="FOLDER",
        help="folder of the index",
    )  # fmt: skip
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--images",
        metavar="FOLDER",
        default="",
        help="create the index of these images, or update it",
    )
    action.add_argument(
        "--add",
        metavar="FOLDER",
        default="",
        help="add these images to the index, or update them",
    )
    action.add_argument(
        "--remove",
        metavar="PATTERN",
        default=None,
        help="remove the images whose path ends with this pattern, for example 'cam3/*', "
        "or which lie below this absolute path",
    )
    add_network_arguments(parser)
    add_device_argument(parser)
    add_batch_size_argument(parser)
    parser.add_argument(
        "--camera-pattern",
        metavar="REGEX",
        default="",
        help="regular expression for the camera: the first group or the whole match in the "
        "name of a file or folder, or with a slash in the path; folders: the first "
        "subfolder; none: no cameras; default: folders if they look like cameras",
    )
    parser.add_argument(
        "--search",
        choices=("auto", "flat", "hnsw", "ivf"),
        default="auto",
        help="type of search: flat is exact, the others need faiss; default: flat up to "
        "100,000 images, hnsw up to 1,000,000, ivf above",
    )
    parser.add_argument(
        "--fp16", action="store_true", help="store float16 features, half the size on disk"
    )
    add_unreadable_argument(parser)
    add_options(parser)
    return parser

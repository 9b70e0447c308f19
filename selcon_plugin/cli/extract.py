"""``selcon extract``: write the features of a folder of images to a file."""

from __future__ import annotations

import argparse
import sys

from selcon_plugin.cli.arguments import (
    add_folder_arguments,
    add_import_argument,
    add_network_arguments,
    add_options,
    add_reading_arguments,
    add_unreadable_argument,
    load_embedder,
)
from selcon_plugin.cli.parsing import CommandParser
from selcon_plugin.config.importing import import_files
from selcon_plugin.hosts import get_host, host_of
from selcon_plugin.io.locks import owned_file
from selcon_plugin.io.output_files import check_output_file


def main(argv: list[str]) -> int:
    """Extract features.

    Args:
        argv: Arguments after ``selcon extract``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If there are no images, or the arguments do not select one network.
    """
    args = _parser().parse_args(argv)
    if not args.images:
        raise ValueError("extract needs --images FOLDER")
    if args.onnx and (args.weights or args.config_file or args.backbone or args.opts):
        raise ValueError("--onnx contains network and config: leave the others out")
    if args.backbone and not args.weights:
        raise ValueError(f"--backbone {args.backbone} needs --weights FILE")
    import_files(args.imports)
    inputs = (args.weights, args.config_file, args.onnx)
    check_output_file(args.output, name="--output", kinds=(".npz",), inputs=inputs)
    with owned_file(args.output):
        count, dim = (_embed if args.onnx or args.weights else _extract_by_config)(args)
    sys.stdout.write(f"{count} features of dimension {dim} written to {args.output}\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon extract",
        description="Write one L2-normalized feature per image to a NumPy file with the "
        "arrays paths, camids and features. Compare images by cosine similarity.",
    )
    add_folder_arguments(parser)
    add_import_argument(parser)
    parser.add_argument("--output", required=True, metavar="FILE.npz", help="file to write")
    add_unreadable_argument(parser)
    add_network_arguments(parser)
    add_reading_arguments(parser)
    add_options(parser)
    return parser


def _embed(args: argparse.Namespace) -> tuple[int, int]:
    embedder = load_embedder(args, args.opts)
    found = embedder.embed_folder(
        args.images,
        camera_pattern=args.camera_pattern,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_unreadable_ratio=args.max_unreadable_ratio,
        show_progress=sys.stderr.isatty(),
    )
    found.save(args.output)
    return len(found.paths), embedder.dim


def _extract_by_config(args: argparse.Namespace) -> tuple[int, int]:
    """Extract with the network that the config names, such as FastReID's MODEL.WEIGHTS."""
    host = get_host(host_of(args.config_file))
    cfg = host.load_config(
        args.config_file, args.opts, images=args.images, camera_pattern=args.camera_pattern
    )
    return host.extract(cfg, args.output)

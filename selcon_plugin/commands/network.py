"""Arguments that name a trained network."""

from __future__ import annotations

import argparse

from selcon_plugin.retrieval import NetworkSource


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command take a checkpoint or an exported file.

    Args:
        parser: Of the command.
    """
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint")
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="its config; default: config.yaml beside it",
    )
    parser.add_argument(
        "--backbone",
        default="",
        metavar="NAME",
        help="model of plain weights, such as osnet_x0_25",
    )
    parser.add_argument(
        "--onnx", default="", metavar="FILE", help="file of selcon export, for --weights"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default: auto"
    )


def network_of(args: argparse.Namespace) -> NetworkSource | None:
    """Return the network that the arguments name, None if none.

    Args:
        args: Parsed arguments; ``opts``, where there are, are ``KEY VALUE`` pairs.

    Returns:
        Where to read it from.

    Raises:
        ValueError: If more than one is named, or a part of one.
    """  # noqa: DOC502  (raised by what this calls)
    named = (args.weights, args.config_file, args.backbone, args.onnx)
    options = tuple(getattr(args, "opts", ()))
    if not any(named) and not options:
        return None
    return NetworkSource(*named, options)

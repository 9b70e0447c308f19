"""``selcon export``: a trained network as ONNX or TorchScript."""

from __future__ import annotations

import argparse
import sys

from selcon_plugin.cli.arguments import (
    add_import_argument,
    add_network_arguments,
    add_options,
)
from selcon_plugin.config.loading import import_files
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.export import (
    LICENCE_NOTE,
    ExportCheck,
    check_crops,
    export_onnx,
    export_torchscript,
)
from selcon_plugin.models.inference import InferenceNetwork


def main(argv: list[str]) -> int:
    """Write a network as the arguments say.

    Args:
        argv: Arguments after the command.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If weights or an output are missing, or what is exported computes
            something else.
    """
    args = _parser().parse_args(argv)
    if not args.weights:
        raise ValueError("export needs --weights FILE")
    if not (args.onnx or args.torchscript):
        raise ValueError("export needs --onnx FILE, --torchscript FILE or both")
    if args.fp16 and not args.onnx:
        raise ValueError("--fp16 is for --onnx alone: leave it out")
    import_files(args.imports)
    network = Embedder.from_checkpoint(
        args.weights,
        config_file=args.config_file,
        backbone=args.backbone,
        device="cpu",
        options=args.opts,
    ).backend
    assert isinstance(network, InferenceNetwork)
    options = {
        "crops": check_crops(args.images),
        "preprocess": args.preprocess,
        "max_difference": args.max_difference,
        "license": args.license,
    }
    if args.onnx:
        check = export_onnx(network, args.onnx, fp16=args.fp16, **options)
        _report(args.onnx, "onnxruntime", network.dim, check)
    if args.torchscript:
        check = export_torchscript(network, args.torchscript, **options)
        _report(args.torchscript, "TorchScript", network.dim, check)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selcon export",
        description="Write a trained network as ONNX or TorchScript, after it was compared "
        "with PyTorch on crops.",
    )
    parser.add_argument("--onnx", default="", metavar="FILE.onnx", help="file to write")
    parser.add_argument(
        "--torchscript", default="", metavar="FILE.pt", help="file to write"
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="put resizing and normalization inside: the input is uint8 RGB of any size",
    )
    parser.add_argument(
        "--fp16", action="store_true", help="let the ONNX backbone compute in float16"
    )
    parser.add_argument(
        "--images",
        default="",
        metavar="FOLDER",
        help="crops to compare on; default: drawn persons",
    )
    parser.add_argument(
        "--max-difference",
        type=float,
        default=None,
        metavar="X",
        help="largest difference of a value that is accepted; default: 1e-4, with --fp16 "
        "or --preprocess 1e-2",
    )
    parser.add_argument(
        "--license",
        "--licence",  # the name before 0.2
        default=LICENCE_NOTE,
        metavar="TEXT",
        help="note in the metadata",
    )
    add_import_argument(parser)
    add_network_arguments(parser, onnx=False)
    add_options(parser)
    return parser


def _report(file: str, runtime: str, dim: int, check: ExportCheck) -> None:
    sys.stdout.write(
        f"{file}: features of {dim} values. {runtime} against PyTorch on "
        f"{check.num_images} crops: largest difference {check.max_difference:.2e}, "
        f"smallest cosine {check.min_cosine:.7f}\n"
    )

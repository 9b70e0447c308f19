"""``selcon export``: write a trained network as ONNX or TorchScript."""

from __future__ import annotations

import sys

from selcon_plugin.cli.arguments import (
    add_import_argument,
    add_network_arguments,
    add_options,
)
from selcon_plugin.cli.parsing import CommandParser, number
from selcon_plugin.config.loading import import_files
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.export import (
    LICENSE_NOTE,
    ExportCheck,
    check_crops,
    export_onnx,
    export_torchscript,
)
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.options import Interval


def main(argv: list[str]) -> int:
    """Export a network.

    Args:
        argv: Arguments after ``selcon export``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If weights or an output file are missing, or the exported network
            computes different features.
    """
    args = _parser().parse_args(argv)
    if not args.weights:
        raise ValueError("export needs --weights FILE")
    if not (args.onnx or args.torchscript):
        raise ValueError("export needs --onnx FILE, --torchscript FILE or both")
    if args.fp16 and not args.onnx:
        raise ValueError("--fp16 applies only to --onnx: leave it out")
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


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon export",
        description="Write a trained network as ONNX or TorchScript. Its features are "
        "first compared with those of PyTorch on crops.",
    )
    parser.add_argument(
        "--onnx", default="", metavar="FILE.onnx", help="ONNX file to write"
    )
    parser.add_argument(
        "--torchscript", default="", metavar="FILE.pt", help="TorchScript file to write"
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="include resizing and normalization: the input is uint8 RGB of any size",
    )
    parser.add_argument(
        "--fp16", action="store_true", help="compute the ONNX backbone in float16"
    )
    parser.add_argument(
        "--images",
        default="",
        metavar="FOLDER",
        help="crops to compare on; default: synthetic persons",
    )
    parser.add_argument(
        "--max-difference",
        type=number(Interval(0, above=True)),
        default=None,
        metavar="X",
        help="largest accepted difference of a feature value; default: 1e-4, or 1e-2 with "
        "--fp16 or --preprocess",
    )
    parser.add_argument(
        "--license",
        "--licence",  # the name before 0.2
        default=LICENSE_NOTE,
        metavar="TEXT",
        help="license note in the metadata of the file",
    )
    add_import_argument(parser)
    add_network_arguments(parser, onnx=False)
    add_options(parser)
    return parser


def _report(file: str, runtime: str, dim: int, check: ExportCheck) -> None:
    sys.stdout.write(
        f"{file}: {dim}-dimensional features. {runtime} compared with PyTorch on "
        f"{check.num_images} crops: largest difference {check.max_difference:.2e}, "
        f"smallest cosine {check.min_cosine:.7f}\n"
    )

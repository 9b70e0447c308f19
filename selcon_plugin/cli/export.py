"""``selcon export``: write a trained network for use without this package."""

from __future__ import annotations

import argparse
import os
import sys

from PIL import Image

from selcon_plugin.cli.arguments import (
    add_import_argument,
    add_network_arguments,
    add_options,
)
from selcon_plugin.cli.parsing import CommandParser, number
from selcon_plugin.config.importing import import_files
from selcon_plugin.hosts import find_network
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.export import (
    LICENSE_NOTE,
    ExportCheck,
    check_crops,
    export_onnx,
    export_torchscript,
)
from selcon_plugin.inference.plain import export_plain
from selcon_plugin.io.output_files import (
    check_output_apart,
    check_output_file,
    check_output_folder,
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
    if not (args.onnx or args.torchscript or args.fastreid or args.torchreid):
        raise ValueError(
            "export needs --onnx FILE, --torchscript FILE, --fastreid FOLDER or "
            "--torchreid FOLDER"
        )
    if args.fp16 and not args.onnx:
        raise ValueError("--fp16 applies only to --onnx: leave it out")
    _check_output(args)
    import_files(args.imports)
    crops = check_crops(args.images)
    for host in ("fastreid", "torchreid"):
        if getattr(args, host):
            _export_plain(args, host, crops)
    if not (args.onnx or args.torchscript):
        return 0
    network = Embedder.from_checkpoint(
        args.weights,
        config_file=args.config_file,
        backbone=args.backbone,
        device="cpu",
        options=args.opts,
    ).backend
    assert isinstance(network, InferenceNetwork)
    options = {
        "crops": crops,
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


def _check_output(args: argparse.Namespace) -> None:
    """Refuse output that would replace what is read, before the network is built."""
    inputs = [args.weights, args.config_file]
    if args.onnx:
        check_output_file(args.onnx, name="--onnx", kinds=(".onnx",), inputs=inputs)
    if args.torchscript:
        check_output_file(
            args.torchscript, name="--torchscript", kinds=(".pt", ".pth"), inputs=inputs
        )
    files = [os.path.realpath(file) for file in (args.onnx, args.torchscript) if file]
    if len(set(files)) < len(files):
        raise ValueError(
            f"--onnx and --torchscript both name {args.onnx}: give each its own file"
        )
    for host in ("fastreid", "torchreid"):
        if folder := getattr(args, host):
            check_output_folder(f"--{host}", folder)
            check_output_apart(folder, args.weights, name=f"--{host}")


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
        "--fastreid",
        default="",
        metavar="FOLDER",
        help="folder for a checkpoint and a config that FastReID uses without this plugin",
    )
    parser.add_argument(
        "--torchreid",
        default="",
        metavar="FOLDER",
        help="folder for a checkpoint and a config that torchreid uses without this plugin",
    )
    parser.add_argument(
        "--global-only",
        action="store_true",
        help="with --fastreid: leave out the parts, which FastReID does not have",
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


def _export_plain(args: argparse.Namespace, host: str, crops: list[Image.Image]) -> None:
    done = export_plain(
        find_network(args.weights, args.config_file, args.backbone),
        host,
        getattr(args, host),
        crops=crops,
        global_only=args.global_only,
        options=args.opts,
    )
    lines = [
        f"{done.weights}, {done.config}: {done.plain.network.dim}-dimensional features. "
        f"{host} compared with the trained network on {done.check.num_images} crops: "
        f"largest difference {done.check.max_difference:.2e}"
    ]
    lines += [f"note: {note}" for note in done.plain.notes]
    if not done.plain.whole:
        lines += [
            f"global branch only: mAP {now:.4f} on {name}, of the whole network {whole:.4f}"
            for name, (whole, now) in done.measured.items()
        ]
        if done.unmeasured:
            lines.append(
                "global branch only: its mAP differs from that of the whole network, and "
                f"was not measured: {done.unmeasured}"
            )
    sys.stdout.write("\n".join(lines) + "\n")


def _report(file: str, runtime: str, dim: int, check: ExportCheck) -> None:
    sys.stdout.write(
        f"{file}: {dim}-dimensional features. {runtime} compared with PyTorch on "
        f"{check.num_images} crops: largest difference {check.max_difference:.2e}, "
        f"smallest cosine {check.min_cosine:.7f}\n"
    )

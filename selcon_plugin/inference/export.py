"""Export of trained networks to ONNX and TorchScript, which run without this package.

Each exported network is compared with PyTorch on crops before it is written. Both formats
use tracing: PyTorch's TorchScript-based ONNX exporter behaves the same on torch 2.4 to 2.13
and needs no further package.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from selcon_plugin._version import __version__
from selcon_plugin.datasets import (
    SyntheticPersonsSpec,
    generate_synthetic_persons,
    read_image_folder,
)
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.inference.onnx import (
    DIM,
    FILTER,
    INPUT,
    INSIDE,
    MEAN,
    OUTPUT,
    SIZE,
    STD,
    OnnxNetwork,
    import_extra,
)
from selcon_plugin.io.atomic import make_folder, replacing
from selcon_plugin.io.output_files import check_output_file
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.pillow_resize import PillowResize
from selcon_plugin.renamed import accept_old_arguments

__all__ = [
    "LICENSE_NOTE",
    "ExportCheck",
    "ExportMismatchError",
    "check_crops",
    "default_max_difference",
    "export_onnx",
    "export_torchscript",
]

LICENSE_NOTE = (
    "The weights are subject to the terms of the images and of the pretrained weights from "
    "which they were trained. The program that wrote this file, selcon_plugin, is "
    "Apache-2.0."
)

# LayerNormalization and all other operators are unchanged since this version, and runtimes
# of 2023 support it.
_OPSET = 17
# Batch sizes of the comparison, because the exported batch axis is dynamic.
_BATCHES = (1, 3, 17)
# Name of the extra file in which TorchScript files keep the metadata of ONNX files.
_EXTRA_FILE = "selcon.json"


class ExportMismatchError(ValueError):
    """Error for an exported network whose features differ from PyTorch; none is written."""


@dataclass(frozen=True)
class ExportCheck:
    """Result of the comparison of an exported network with PyTorch.

    Attributes:
        num_images: Number of compared crops.
        max_difference: Largest absolute difference between values of the unit vectors.
        min_cosine: Smallest cosine between the two vectors of a crop.
    """

    num_images: int
    max_difference: float
    min_cosine: float

    @classmethod
    def of(cls, expected: NDArray[np.float32], got: NDArray[np.float32]) -> ExportCheck:
        """Compare two sets of vectors.

        Args:
            expected: Vectors of PyTorch, ``(N, D)``.
            got: Vectors of the exported network.

        Returns:
            The comparison; NaN counts as an infinite difference.
        """
        if expected.shape != got.shape:
            return cls(len(expected), float("inf"), -1.0)
        left, right = expected.astype(np.float64), got.astype(np.float64)
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosines = (left * right).sum(1) / lengths
        difference = float(np.abs(left - right).max())
        if not np.isfinite(difference):
            return cls(len(expected), float("inf"), -1.0)
        return cls(len(expected), difference, float(cosines.min()))


class _FromCrops(nn.Module):
    """Network with built-in preprocessing, for batches of crops of any one size."""

    def __init__(self, network: InferenceNetwork) -> None:
        super().__init__()
        preprocessing = network.preprocessing
        self.network = network
        self.resize = PillowResize(preprocessing.size, preprocessing.interpolation)
        for name, values in (
            ("mean", preprocessing.pixel_mean),
            ("std", preprocessing.pixel_std),
        ):
            column = torch.tensor(values, device=network.device).view(-1, 1, 1)
            self.register_buffer(name, column)

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network((self.resize(pixels) - self.mean) / self.std)
        return features


class _HalfPrecision(nn.Module):
    """A module in float16 between float32 input and output."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module.half()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.module(images.half()).float()
        return result


def default_max_difference(*, fp16: bool, preprocess: bool) -> float:
    """Return the default bound on the difference of an exported network from PyTorch.

    Args:
        fp16: Whether the exported network computes in half precision.
        preprocess: Whether it resizes images; single pixels may differ by a gray level.

    Returns:
        Bound on the absolute difference of any value of the unit vectors.
    """
    return 1e-2 if fp16 or preprocess else 1e-4


def check_crops(folder: str | Path = "", number: int = 32) -> list[Image.Image]:
    """Read or render the crops for the comparison of an exported network.

    Args:
        folder: Folder of images, which is sampled evenly; empty for synthetic persons.
        number: Maximum number of crops.

    Returns:
        8-bit RGB images.

    Raises:
        ValueError: If the folder contains no images. ``FileNotFoundError`` if it does not
            exist, ``ImageReadError`` if an image is unreadable.
    """  # noqa: DOC502  (raised by the functions called here)
    if not folder:
        spec = SyntheticPersonsSpec(
            num_train_ids=8, num_test_ids=4, images_per_id=4, num_distractors=0
        )
        with tempfile.TemporaryDirectory() as rendered:
            generate_synthetic_persons(rendered, spec)
            return check_crops(rendered, number)
    paths = [item.path for item in read_image_folder(folder, camera_pattern="none")]
    places = np.linspace(0, len(paths) - 1, min(number, len(paths))).astype(int)
    return [read_rgb(paths[place]) for place in places]


@accept_old_arguments
def export_onnx(
    network: InferenceNetwork,
    file: str | Path,
    *,
    crops: Sequence[Image.Image],
    preprocess: bool = False,
    fp16: bool = False,
    max_difference: float | None = None,
    license: str = LICENSE_NOTE,
) -> ExportCheck:
    """Export a network to ONNX, after a comparison of onnxruntime with PyTorch.

    The input ``images`` is float32 ``(B, 3, height, width)``, resized and normalized as
    stated in the metadata; with ``preprocess`` it is uint8 ``(B, h, w, 3)``, RGB, of any h
    and w. The output ``features`` is float32 ``(B, D)``, unit vectors. B is dynamic.

    Args:
        network: Network to export.
        file: File to write or replace.
        crops: Images for the comparison.
        preprocess: Whether to include resizing and normalization in the network.
        fp16: Whether the network computes in half precision. Resizing, normalization and
            the head stay in float32, as do input and output.
        max_difference: Largest difference that is accepted; None for
            :func:`default_max_difference`.
        license: License note for the metadata.

    Returns:
        Result of the comparison.

    Raises:
        ExportMismatchError: If the difference is larger; nothing is written.
        ImportError: If onnx or onnxruntime is not installed.
        ValueError: If ONNX lacks an operation of the network, this PyTorch lacks it in
            half precision, or an existing file of this name is of another kind.
    """  # noqa: DOC502  (raised by the functions called here)
    check_output_file(file, name="file", kinds=(".onnx",))
    onnx = import_extra("onnx")
    traced = _in_half_precision(network) if fp16 else network
    model = onnx.load_model_from_string(_traced_onnx(traced, preprocess))
    metadata = _metadata(network, preprocess=preprocess, fp16=fp16, license=license)
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in metadata.items()})
    content = model.SerializeToString()
    check = _compare(network, crops, OnnxNetwork(content).embed_pixels, preprocess)
    bound = max_difference
    if bound is None:
        bound = default_max_difference(fp16=fp16, preprocess=preprocess)
    _refuse_if_far(check, bound, file)
    _write(content, file)
    return check


@accept_old_arguments
def export_torchscript(
    network: InferenceNetwork,
    file: str | Path,
    *,
    crops: Sequence[Image.Image],
    preprocess: bool = False,
    max_difference: float | None = None,
    license: str = LICENSE_NOTE,
) -> ExportCheck:
    """Export a network to TorchScript, after a comparison of the export with PyTorch.

    Input and output are those of :func:`export_onnx`; its metadata is here JSON in the
    extra file ``selcon.json``.

    Args:
        network: Network to export.
        file: File to write or replace.
        crops: Images for the comparison.
        preprocess: Whether to include resizing and normalization in the network.
        max_difference: Largest difference that is accepted; None for
            :func:`default_max_difference`.
        license: License note for the metadata.

    Returns:
        Result of the comparison.

    Raises:
        ExportMismatchError: If the difference is larger; nothing is written.
        ValueError: If an existing file of this name is of another kind.
    """  # noqa: DOC502  (raised by the functions called here)
    check_output_file(file, name="file", kinds=(".pt", ".pth"))
    module, example = _module_and_example(network, preprocess)
    metadata = _metadata(network, preprocess=preprocess, fp16=False, license=license)
    stream = io.BytesIO()
    with _quiet_tracing():
        jit: Any = torch.jit
        traced = jit.trace(module, (example,), check_trace=False)
        extra = {_EXTRA_FILE: json.dumps(metadata)}
        jit.save(traced, stream, _extra_files=extra)
        stream.seek(0)
        loaded: Any = jit.load(stream, map_location=network.device)

    @torch.inference_mode()
    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = torch.from_numpy(pixels).to(network.device)
        if not preprocess:
            images = network.preprocessing.normalize(images)
        features: NDArray[np.float32] = loaded(images).cpu().numpy()
        return features

    check = _compare(network, crops, embed, preprocess)
    bound = max_difference
    if bound is None:
        bound = default_max_difference(fp16=False, preprocess=preprocess)
    _refuse_if_far(check, bound, file)
    _write(stream.getvalue(), file)
    return check


def _module_and_example(
    network: InferenceNetwork, preprocess: bool
) -> tuple[nn.Module, Tensor]:
    height, width = network.preprocessing.size
    if preprocess:
        # Neither side has the input size, so that tracing does not omit the resizing.
        size = (2, height + 3, width + 5, 3)
        pixels = torch.zeros(size, dtype=torch.uint8, device=network.device)
        return _FromCrops(network).eval(), pixels
    return network, torch.zeros(2, 3, height, width, device=network.device)


def _in_half_precision(network: InferenceNetwork) -> InferenceNetwork:
    """Copy a network and convert its backbone, or the whole model, to float16."""
    half = copy.deepcopy(network)
    if isinstance(getattr(half.network, "backbone", None), nn.Module):
        half.network.backbone = _HalfPrecision(half.network.backbone)
    else:
        half.network = _HalfPrecision(half.network)
    return half


def _traced_onnx(network: InferenceNetwork, preprocess: bool) -> bytes:
    module, example = _module_and_example(network, preprocess)
    open_axes = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
    if preprocess:
        open_axes[INPUT] |= {1: "height", 2: "width"}
    options: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # torch >= 2.5
        options["dynamo"] = False
    stream: Any = io.BytesIO()
    try:
        with _quiet_tracing():
            torch.onnx.export(
                module,
                (example,),
                stream,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes=open_axes,
                opset_version=_OPSET,
                **options,
            )
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the network cannot be exported to ONNX: {reason}. Try TorchScript or float32"
        ) from error
    content: bytes = stream.getvalue()
    return content


@contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Silence warnings of the tracer, whose result is compared right away.

    Sizes become constants, as intended because the input size is fixed, and TorchScript and
    its exporter are deprecated since torch 2.9.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _metadata(
    network: InferenceNetwork, *, preprocess: bool, fp16: bool, license: str
) -> dict[str, Any]:
    preprocessing = network.preprocessing
    return {
        SIZE: list(preprocessing.size),
        MEAN: list(preprocessing.pixel_mean),
        STD: list(preprocessing.pixel_std),
        FILTER: preprocessing.interpolation,
        DIM: network.dim,
        INSIDE: preprocess,
        "channel_order": "RGB",
        "layout": "NHWC" if preprocess else "NCHW",
        "pixel_scale": "0..255",
        "feature": "unit vector; cosine compares",
        "precision": "float16" if fp16 else "float32",
        "method": network.method,
        "host": network.host,
        "license": license,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "selcon_plugin": __version__,
        },
    }


def _compare(
    network: InferenceNetwork,
    crops: Sequence[Image.Image],
    embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    preprocess: bool,
) -> ExportCheck:
    """Compare the network with PyTorch on crops, in batches of several sizes."""
    if not crops:
        raise ValueError("there are no crops to compare on")
    resized = np.stack([network.preprocessing.resize(crop) for crop in crops])
    expected, got = [], []
    for start, end in _batches(len(crops)):
        expected.append(network.embed_pixels(resized[start:end]))
        if preprocess:  # crops of different sizes cannot be stacked
            got += [embed(np.array(crop)[None]) for crop in crops[start:end]]
        else:
            got.append(embed(resized[start:end]))
    return ExportCheck.of(np.concatenate(expected), np.concatenate(got))


def _batches(number: int) -> Iterator[tuple[int, int]]:
    start = turn = 0
    while start < number:
        end = min(number, start + _BATCHES[turn % len(_BATCHES)])
        yield start, end
        start, turn = end, turn + 1


def _refuse_if_far(check: ExportCheck, bound: float, file: str | Path) -> None:
    if check.max_difference <= bound:
        return
    raise ExportMismatchError(
        f"{file} is not written: on {check.num_images} crops the exported network differs "
        f"from PyTorch by up to {check.max_difference:.2e} (smallest cosine "
        f"{check.min_cosine:.6f}), more than --max-difference {bound:g} allows"
    )


def _write(content: bytes, file: str | Path) -> None:
    make_folder(Path(file).parent)
    with replacing(file) as stream:
        stream.write(content)

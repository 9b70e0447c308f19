"""Inference with exported ONNX networks in onnxruntime, without any host."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selcon_plugin.config.checks import check_network_file
from selcon_plugin.inference.onnx_safety import check_onnx
from selcon_plugin.installing import install_command
from selcon_plugin.models.pillow_resize import PILLOW_FILTERS
from selcon_plugin.models.preprocessing import Preprocessing

# Metadata entries that a reader needs; each value is JSON.
SIZE, MEAN, STD, FILTER, DIM = (
    "input_size",
    "pixel_mean",
    "pixel_std",
    "interpolation",
    "dimension",
)
INSIDE = "preprocessing_inside"
INPUT, OUTPUT = "images", "features"
_MAX_SIDE = 4096


def import_extra(module: str) -> Any:
    """Import a package of the optional dependencies ``export``.

    Args:
        module: Name of the module.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed; the message names the command to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed for ONNX: {install_command('export')}"
        ) from error


class OnnxNetwork:
    """Network in onnxruntime that maps images to unit vectors, on a GPU if it finds one.

    Args:
        file: File that ``selcon export --onnx`` has written, or its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If onnx or onnxruntime is not installed.
        ValueError: If it is another kind of file, was not written by the plugin, or could
            run without bound; see :func:`selcon_plugin.inference.onnx_safety.check_onnx`.

    Attributes:
        preprocessing: Resizing and normalization of the images.
        dim: Feature dimension D.
        inside: Whether the network resizes and normalizes images itself.
        metadata: Metadata of the file by name.
    """

    def __init__(self, file: str | Path | bytes) -> None:
        name = "the exported network" if isinstance(file, bytes) else str(file)
        if not isinstance(file, bytes):
            check_network_file("the exported network", str(file))
        runtime = import_extra("onnxruntime")
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        check_onnx(import_extra("onnx"), content, name)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        usable = runtime.get_available_providers()
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        try:
            self._session = runtime.InferenceSession(
                content,  # what was checked; by its path it could read other files
                options,
                providers=[name for name in wanted if name in usable],
            )
        except Exception as error:
            # The error classes of onnxruntime have no other common base class.
            reason = str(error).splitlines()[0]
            raise ValueError(f"{name} cannot be run as ONNX: {reason}") from error
        self.metadata = _decoded(self._session.get_modelmeta().custom_metadata_map)
        try:
            self.preprocessing = _preprocessing(self.metadata)
            self.dim, self.inside = int(self.metadata[DIM]), bool(self.metadata[INSIDE])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} has no valid metadata about the preprocessing of images "
                f"({type(error).__name__}: {error}): write it with selcon export"
            ) from error

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute the features of images.

        Args:
            pixels: RGB images, shape ``(B, h, w, 3)``, resized unless the network does it.

        Returns:
            Unit vectors, shape ``(B, D)``.
        """
        images = pixels
        if not self.inside:
            images = self.preprocessing.normalize(torch.from_numpy(pixels)).numpy()
        features: NDArray[np.float32] = self._session.run([OUTPUT], {INPUT: images})[0]
        return features


def _preprocessing(metadata: Mapping[str, Any]) -> Preprocessing:
    height, width = (int(side) for side in metadata[SIZE])
    mean, std = (tuple(float(x) for x in metadata[key]) for key in (MEAN, STD))
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise ValueError(f"{SIZE} is {metadata[SIZE]}")
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or 0 in std:
        raise ValueError(f"{MEAN} is {mean}, {STD} is {std}")
    if metadata[FILTER] not in PILLOW_FILTERS:
        raise ValueError(f"{FILTER} is {metadata[FILTER]!r}")
    return Preprocessing((height, width), metadata[FILTER], mean, std)


def _decoded(metadata: Mapping[str, str]) -> dict[str, Any]:
    decoded = {}
    for key, text in metadata.items():
        try:
            decoded[key] = json.loads(text)
        except ValueError:  # an entry of another program
            decoded[key] = text
    return decoded

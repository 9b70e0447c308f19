"""``FolderFeatures``: the features of a folder of images, and their file."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.features import BadFeaturesError, check_features
from selcon_plugin.io.atomic import make_folder, replacing
from selcon_plugin.io.integrity import DamagedFileError, verify_zip
from selcon_plugin.io.output_files import check_output_file

_REMEDY = "Create one with selcon extract"
# What NumPy raises for other files and for damaged ones.
_DAMAGED = (
    *(KeyError, ValueError, OSError, TypeError, EOFError, AttributeError),
    *(NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class FolderFeatures:
    """Features of a folder of images, the content of the file of ``selcon extract``.

    Attributes:
        paths: Path of each image.
        camids: Camera of each image as 0, 1, ..., int64 ``(N,)``; -1 where unknown.
        features: Unit vectors, float32 ``(N, D)``.

    Raises:
        BadFeaturesError: If the features are not unit vectors, one per path.
        ValueError: If there is not one camera per path.
    """

    paths: tuple[str, ...]
    camids: NDArray[np.int64]
    features: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Check that the arrays belong together."""
        check_features(self.features, source="the features", rows=len(self.paths))
        if self.camids.shape != (len(self.paths),) or self.camids.dtype.kind not in "iu":
            raise ValueError(
                f"camids must be {len(self.paths)} whole numbers, one per path, got "
                f"{self.camids.dtype} of shape {self.camids.shape}"
            )

    def save(self, file: str | Path) -> None:
        """Write a NumPy file with the arrays ``paths``, ``camids`` and ``features``.

        Args:
            file: File to write or replace; its folder is created.

        Raises:
            ValueError: If an existing file of this name is not a ``.npz`` file.
        """  # noqa: DOC502  (raised by the functions called here)
        check_output_file(file, name="file", kinds=(".npz",))
        make_folder(Path(file).parent)
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
            DamagedFileError: If it differs from what was written.
            BadFeaturesError: If there is not one unit vector per path.
            ValueError: If it is not a file of features.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no feature file {file}")
        try:
            # NumPy does not close a file that it opened if the archive is broken.
            with open(file, "rb") as stream:
                verify_zip(stream, remedy=_REMEDY)
                with np.load(stream, allow_pickle=False) as arrays:
                    paths, camids = arrays["paths"], arrays["camids"]
                    features = arrays["features"]
        except DamagedFileError:
            raise
        except _DAMAGED as error:
            raise ValueError(f"{file} is not a feature file. {_REMEDY}") from error
        if paths.ndim != 1 or paths.dtype.kind != "U" or not len(paths):
            raise ValueError(f"{file} does not list the paths of images")
        if camids.shape != paths.shape or features.shape[:1] != paths.shape:
            raise BadFeaturesError(
                f"{file} does not contain one feature and camera per path, but features of "
                f"shape {features.shape} and {camids.shape} cameras for {len(paths)} paths"
            )
        checked = check_features(features, source=str(file), rows=len(paths))
        try:
            return cls(tuple(paths.tolist()), camids, checked)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

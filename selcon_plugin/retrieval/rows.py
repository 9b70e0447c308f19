"""Rows of an index: the image of each row, and which rows are removed.

The list of images is a log to which lines of JSON are appended:

    [path, camera, bytes, modification time, content, real path]    image of the next row
    {"removed": [row, ...]}                                         rows to leave out
    {"replaced": [[row, [path, ...]], ...]}                         images of earlier rows
    {"checksums": [first row, rows per block, [CRC-32, ...]]}       of new rows' features
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.retrieval.feature_file import Blocks, FeatureFile
from selcon_plugin.retrieval.manifest import Manifest


class IndexedImage(NamedTuple):
    """Image of an index.

    Attributes:
        path: Absolute path of the file.
        camera: Name of the camera; None where unknown.
        size: Size of the file in bytes when it was read.
        changed: Modification time of the file when it was read, in nanoseconds.
        content: Hash of the file's content when it was read; "" where unknown.
        real: Path without symbolic links; "" if ``path`` has none.
    """

    path: str
    camera: str | None
    size: int
    changed: int
    content: str = ""
    real: str = ""

    @property
    def key(self) -> str:
        """Path without symbolic links, which identifies the file."""
        return self.real or self.path


class Log:
    """Content of the list of images.

    Attributes:
        images: Image of each row.
        removed: Numbers of the removed rows.
        blocks: Checksums of the rows' features.
    """

    def __init__(self) -> None:
        self.images: list[IndexedImage] = []
        self.removed: set[int] = set()
        self.blocks = Blocks()

    def read(self, content: bytes) -> None:
        """Apply lines in order.

        Args:
            content: Lines that follow the ones applied before.

        Raises:
            ValueError: If a line is of another kind.
        """  # noqa: DOC502  (raised by the functions called here)
        for line in content.splitlines():
            self.apply(json.loads(line))

    def apply(self, entry: Any) -> None:
        """Apply one entry.

        Args:
            entry: Content of a line.

        Raises:
            ValueError: If it is of another kind.
        """
        if isinstance(entry, list):
            self.images.append(IndexedImage(*entry))
        elif "removed" in entry:
            self.removed.update(entry["removed"])
        elif "replaced" in entry:
            for row, image in entry["replaced"]:
                self.images[row] = IndexedImage(*image)
        elif "checksums" in entry:
            self.blocks.add(*entry["checksums"])
        else:
            raise ValueError(f"unknown entry {str(entry)[:80]}")


class Snapshot:
    """An index at one moment; later changes of its files do not change it.

    Args:
        manifest: The manifest at that moment.
        log: Content of the list of images, which may grow later.
        features: The features at that moment.

    Attributes:
        live: Mask of the N rows that are not removed.
    """

    def __init__(self, manifest: Manifest, log: Log, features: FeatureFile) -> None:
        self.manifest = manifest
        self.log = log
        self.features = features
        self.live = np.ones(manifest.num_rows, dtype=bool)
        self.live[list(log.removed)] = False
        self.num_live = int(self.live.sum())

    @property
    def images(self) -> Sequence[IndexedImage]:
        """Image of each row; there may be later rows behind the N of this moment."""
        return self.log.images

    @cached_property
    def cameras(self) -> NDArray[np.object_]:
        """Camera of each of the N rows, None where unknown."""
        names = [image.camera for image in self.images[: self.manifest.num_rows]]
        return np.array(names, dtype=object)

    @cached_property
    def camera_names(self) -> list[str]:
        """Sorted names of the cameras of rows that are not removed."""
        return sorted({name for name in self.cameras[self.live] if name is not None})

    def allowed(
        self, camera: Sequence[str] = (), not_camera: Sequence[str] = ()
    ) -> NDArray[np.bool_]:
        """Return the mask of the rows that a search may find, shape ``(N,)``.

        Args:
            camera: Cameras to search; empty for all.
            not_camera: Cameras to exclude.

        Raises:
            ValueError: If no image is from one of the cameras.
        """  # noqa: DOC502  (raised by the functions called here)
        allowed = self.live
        self.check_cameras([*camera, *not_camera])
        if camera:
            is_named = np.isin(self.cameras.astype(str), camera)
            allowed = allowed & is_named & (self.cameras != None)  # noqa: E711
        for name in not_camera:
            allowed = allowed & (self.cameras != name)
        return allowed

    def check_cameras(self, names: Sequence[str]) -> None:
        """Refuse names of cameras that the index does not have.

        Args:
            names: Names of cameras.

        Raises:
            ValueError: If no image is from one of them.
        """
        known = self.camera_names if names else []
        for name in names:
            if name not in known:
                raise ValueError(
                    f"no image of the index is from camera {name!r}; its cameras are "
                    f"{', '.join(known) or 'none'}"
                )

    def rows_by_key(self) -> tuple[dict[str, int], list[int]]:
        """Return the row of each file by its key, and further rows of the same files."""
        rows: dict[str, int] = {}
        repeated = []
        for row in np.flatnonzero(self.live).tolist():
            if rows.setdefault(self.images[row].key, row) != row:
                repeated.append(row)
        return rows, repeated


def open_features(
    folder: Path, manifest: Manifest, log: Log, before: FeatureFile | None = None
) -> FeatureFile:
    """Open the features that a manifest names.

    Args:
        folder: Folder of the index.
        manifest: Its manifest.
        log: Content of the list of images.
        before: The features at an earlier moment, in the same file.

    Returns:
        The features.
    """
    shape = (manifest.num_rows, manifest.dim)
    blocks = log.blocks if manifest.has_checksums else None
    file = folder / manifest.features_file
    return FeatureFile(file, manifest.dtype, shape, blocks, before)


def lines(entries: Sequence[Sequence[Any] | Mapping[str, Any]]) -> bytes:
    """Format entries of the log as lines.

    Args:
        entries: Images, or what else a line may hold.

    Returns:
        The lines.
    """
    return "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()

"""Files of an index: one folder to which rows are appended.

``index.json`` records how much of the other files is valid. They grow at their end, and it
is replaced after they are on disk: the rows that a killed process appended are not valid,
and the next process overwrites them.

    index.json           format, network, number of rows
    features-<g>.bin     a row of float16 or float32 values per image
    images-<g>.jsonl     a line [path, camera, bytes, modification time] per image, and
                         lines {"removed": [row, ...]}

g counts how often the files were rewritten without the removed rows.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.io.atomic import remove_partial_files, write_atomically
from selcon_plugin.io.locks import exclusive

MANIFEST = "index.json"
_LOCK = ".lock"
_FORMAT = 1
_DTYPES = ("float16", "float32")
_COPIED_ROWS = 65_536


class IndexedImage(NamedTuple):
    """Image of an index.

    Attributes:
        path: Absolute path of the file.
        camera: Name of the camera; None where unknown.
        size: Size of the file in bytes when it was read.
        changed: Modification time of the file when it was read, in nanoseconds.
    """

    path: str
    camera: str | None
    size: int
    changed: int


@dataclass(frozen=True)
class Manifest:
    """Content of ``index.json``.

    Attributes:
        dim: Feature dimension D.
        dtype: ``"float16"`` or ``"float32"``.
        search: Requested kind of search.
        network: Source of the network and the hash of its file.
        probe: Features of the probes by the network.
        num_rows: Number of valid rows, including removed ones.
        log_bytes: Number of valid bytes in the list of images.
        generation: Number of times that the files were rewritten.
        approximate: Kind, file and number of rows of the approximate search, if any.
        format: Version of this layout.
    """

    dim: int
    dtype: str
    search: str
    network: dict[str, Any]
    probe: list[list[float]]
    num_rows: int = 0
    log_bytes: int = 0
    generation: int = 0
    approximate: dict[str, Any] = field(default_factory=dict)
    format: int = _FORMAT

    @property
    def features_file(self) -> str:
        """Name of the feature file."""
        return f"features-{self.generation}.bin"

    @property
    def images_file(self) -> str:
        """Name of the list of images."""
        return f"images-{self.generation}.jsonl"


class Store:
    """Rows of an index, in the state that ``index.json`` records.

    Open one with :meth:`create` or :meth:`open`. A writer must hold :meth:`writing`.

    Args:
        folder: Folder of the index.
        manifest: Content of its ``index.json``.

    Attributes:
        images: Image of each of the N rows.
        live: Mask of the rows that are not removed, shape ``(N,)``.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.images: list[IndexedImage] = []
        self._live: list[bool] = []
        self._read_images()

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> Store:
        """Write an empty index.

        Args:
            folder: Folder, which is created if it does not exist.
            manifest: Manifest without rows.

        Returns:
            The store.

        Raises:
            ValueError: If the folder is not empty.
        """
        folder = Path(folder).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)
        if any(entry.name != _LOCK for entry in folder.iterdir()):
            raise ValueError(f"{folder} is not empty: name a new folder for the index")
        write_atomically(json.dumps(asdict(manifest)), folder / MANIFEST)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """Read an index.

        Args:
            folder: Folder of the index.

        Returns:
            The store.

        Raises:
            FileNotFoundError: If there is no index.
            ValueError: If it is damaged, or of a later version.
        """
        folder = Path(folder).expanduser().absolute()
        file = folder / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no index in {str(folder)!r}: create one with selcon index"
            )
        try:
            manifest = Manifest(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if manifest.format != _FORMAT or manifest.dtype not in _DTYPES:
            raise ValueError(f"{file} was written by another version of selcon_plugin")
        try:
            return cls(folder, manifest)
        except (OSError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"the index in {folder} is damaged: {error}") from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the index for writing; other writers wait until the lock is released.

        Yields:
            Nothing. The changes of earlier writers are read first.
        """
        with exclusive(self.folder / _LOCK) as lock:
            now = Store.open(self.folder)
            self.manifest, self.images, self._live = now.manifest, now.images, now._live
            if lock is not None:
                remove_partial_files(self.folder)
                self._remove_leftovers()
            yield

    @property
    def live(self) -> NDArray[np.bool_]:
        """Mask of the rows that are not removed, shape ``(N,)``."""
        return np.array(self._live, dtype=bool)

    @property
    def num_live(self) -> int:
        """Number of images."""
        return sum(self._live)

    def features(self) -> NDArray[Any]:
        """Map the features ``(N, D)`` into memory, read-only."""
        shape = (self.manifest.num_rows, self.manifest.dim)
        if not shape[0]:
            return np.zeros(shape, dtype=self.manifest.dtype)
        file = self.folder / self.manifest.features_file
        return np.memmap(file, dtype=self.manifest.dtype, mode="r", shape=shape)

    def append(
        self,
        features: NDArray[np.float32],
        images: Sequence[IndexedImage],
        *,
        instead_of: Sequence[int] = (),
    ) -> None:
        """Add images and remove others in one step.

        Args:
            features: Features of the new images, shape ``(n, D)``.
            images: The n new images.
            instead_of: Rows to remove.
        """
        self._append_bytes(
            self.manifest.features_file,
            self.manifest.num_rows * self._row_bytes,
            np.ascontiguousarray(features, dtype=self.manifest.dtype).tobytes(),
        )
        lines = [json.dumps(image) for image in images]
        if instead_of:
            lines.append(json.dumps({"removed": [int(row) for row in instead_of]}))
        self._commit(lines, len(images))
        self.images.extend(images)
        self._live.extend([True] * len(images))
        for row in instead_of:
            self._live[row] = False

    def remove(self, rows: Sequence[int]) -> None:
        """Remove images.

        Args:
            rows: Rows of the images.
        """
        empty = np.zeros((0, self.manifest.dim), dtype=np.float32)
        self.append(empty, [], instead_of=rows)

    def set_approximate(self, approximate: dict[str, Any]) -> None:
        """Record the file of an approximate search, which replaces an earlier one.

        Args:
            approximate: Kind, file and number of rows; empty for none.
        """
        self._write_manifest(replace(self.manifest, approximate=approximate))
        self._remove_leftovers()

    def rewrite(self) -> None:
        """Rewrite the files without the removed rows."""
        before, rows = self.manifest, np.flatnonzero(self.live)
        features, images = self.features(), self.images
        fresh = replace(
            before,
            num_rows=0,
            log_bytes=0,
            generation=before.generation + 1,
            approximate={},
        )
        # The new files are not valid until the new manifest is written.
        log = "".join(json.dumps(images[row]) + "\n" for row in rows).encode()
        with open(self.folder / fresh.features_file, "wb") as stream:
            for start in range(0, len(rows), _COPIED_ROWS):
                stream.write(features[rows[start : start + _COPIED_ROWS]].tobytes())
            _flush(stream)
        with open(self.folder / fresh.images_file, "wb") as stream:
            stream.write(log)
            _flush(stream)
        self._write_manifest(replace(fresh, num_rows=len(rows), log_bytes=len(log)))
        self.images = [images[row] for row in rows]
        self._live = [True] * len(rows)
        self._remove_leftovers()

    @property
    def _row_bytes(self) -> int:
        return self.manifest.dim * np.dtype(self.manifest.dtype).itemsize

    def _read_images(self) -> None:
        manifest = self.manifest
        if not manifest.log_bytes:
            return
        if self.folder.joinpath(manifest.features_file).stat().st_size < (
            manifest.num_rows * self._row_bytes
        ):
            raise ValueError(f"{manifest.features_file} is too short")
        with open(self.folder / manifest.images_file, "rb") as stream:
            lines = stream.read(manifest.log_bytes).splitlines()
        removed: list[int] = []
        for line in lines:
            entry = json.loads(line)
            if isinstance(entry, dict):
                removed.extend(entry["removed"])
            else:
                self.images.append(IndexedImage(*entry))
        if len(self.images) != manifest.num_rows:
            raise ValueError(f"{manifest.images_file} is too short")
        self._live = [True] * manifest.num_rows
        for row in removed:
            self._live[row] = False

    def _commit(self, lines: Sequence[str], num_images: int) -> None:
        log = "".join(f"{line}\n" for line in lines).encode()
        manifest = self.manifest
        self._append_bytes(manifest.images_file, manifest.log_bytes, log)
        self._write_manifest(
            replace(
                manifest,
                num_rows=manifest.num_rows + num_images,
                log_bytes=manifest.log_bytes + len(log),
            )
        )

    def _write_manifest(self, manifest: Manifest) -> None:
        write_atomically(json.dumps(asdict(manifest)), self.folder / MANIFEST)
        self.manifest = manifest

    def _remove_leftovers(self) -> None:
        """Remove files that the manifest does not name."""
        manifest = self.manifest
        named = {manifest.features_file, manifest.images_file}
        named.add(manifest.approximate.get("file", ""))
        for kind in ("features", "images", "approximate"):
            for file in self.folder.glob(f"{kind}-*"):
                if file.name not in named:
                    # Windows keeps a file that a reader has mapped: the next writer
                    # removes it.
                    with contextlib.suppress(PermissionError):
                        file.unlink(missing_ok=True)

    def _append_bytes(self, name: str, position: int, content: bytes) -> None:
        """Write after the valid part, over bytes that a killed process left there."""
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b") as stream:
            stream.truncate(position)
            stream.seek(position)
            stream.write(content)
            _flush(stream)


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())

"""Files of an index: one folder to which rows are appended.

``index.json`` records how much of the other files is valid. They grow at their end, and it
is replaced after they are on disk: the rows that a killed process appended are not valid,
and the next process overwrites them.

    index.json           format, network, number of rows
    features-<g>.bin     a row of float16 or float32 values per image
    images-<g>.jsonl     a line per image, see ``rows``

g counts how often the files were rewritten without the removed rows. Each file has a
checksum: the manifest its own and that of the list of images, which holds those of the
features.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.io.atomic import FileWriteError, make_folder, remove_partial_files
from selcon_plugin.io.integrity import DamagedFileError, file_checksum
from selcon_plugin.io.locks import exclusive
from selcon_plugin.retrieval.feature_file import FeatureFile
from selcon_plugin.retrieval.manifest import FORMAT, MANIFEST, Manifest, is_own_file
from selcon_plugin.retrieval.rows import IndexedImage, Log, Snapshot, lines, open_features

__all__ = ["MANIFEST", "IndexedImage", "Manifest", "Store"]

logger = logging.getLogger(__name__)

_LOCK, _OWNER = ".lock", ".lock.owner"
_LOCK_FILES = (_LOCK, _OWNER)
# Seconds that a second writer waits for the first one.
_MAX_WAIT = 30.0
_COPIED_ROWS = 65_536
# Attempts to read an index that other processes change at the same time.
_ATTEMPTS = 20
_REMEDY = "Remove the folder, and create the index again with selcon index"


class Store:
    """Images and features of an index on disk.

    Open one with :meth:`create` or :meth:`open`.

    Args:
        folder: Folder of the index.

    Attributes:
        folder: Absolute path of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._is_writing = False
        self._seen: tuple[int, ...] = ()
        self._state = self._read(None)

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
        make_folder(folder)
        _refuse_links(folder, _LOCK_FILES)
        with _locked(folder):
            remove_partial_files(folder)
            if any(entry.name not in _LOCK_FILES for entry in folder.iterdir()):
                raise ValueError(f"{folder} is not empty: name a new folder for the index")
            manifest.write(folder)
        return cls(folder)

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
        """  # noqa: DOC502  (raised by the functions called here)
        return cls(Path(folder).expanduser().absolute())

    @property
    def state(self) -> Snapshot:
        """The index as it is now; changes of other processes are read first."""
        if self._is_writing:  # other writers wait
            return self._state
        with self._lock:
            if self._seen != self._signature():
                self._state = self._read(self._state)
            return self._state

    @property
    def manifest(self) -> Manifest:
        """Content of ``index.json``."""
        return self.state.manifest

    @property
    def images(self) -> Sequence[IndexedImage]:
        """Image of each row, including removed ones."""
        return self.state.images

    @property
    def live(self) -> NDArray[np.bool_]:
        """Mask of the rows that are not removed, shape ``(N,)``."""
        return self.state.live

    @property
    def num_live(self) -> int:
        """Number of images."""
        return self.state.num_live

    def features(self) -> FeatureFile:
        """Return the features ``(N, D)``, read-only."""
        return self.state.features

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the index for writing; other writers wait for at most 30 s.

        Yields:
            Nothing. The changes of earlier writers are read first.

        Raises:
            InUseError: If another process writes for longer than that.
            ValueError: If a file of the index is a symbolic link.
        """  # noqa: DOC502  (raised by the functions called here)
        names = {MANIFEST, *_LOCK_FILES, *Manifest.read(self.folder).files}
        _refuse_links(self.folder, sorted(names))
        with _locked(self.folder) as lock:
            with self._lock:
                self._state = self._read(self._state)
                self._is_writing = True
            try:
                if lock is not None:
                    remove_partial_files(self.folder)
                    self._remove_leftovers()
                if not self._state.manifest.has_checksums or self._has_hard_links():
                    self.rewrite()
                yield
            finally:
                self._is_writing = False

    def append(
        self,
        features: NDArray[np.float32],
        images: Sequence[IndexedImage],
        *,
        instead_of: Sequence[int] = (),
        replaced: Mapping[int, IndexedImage] | None = None,
    ) -> None:
        """Add images, remove others and replace the entries of others in one step.

        Args:
            features: Features of the new images, shape ``(n, D)``.
            images: The n new images.
            instead_of: Rows to remove.
            replaced: New image by row, for rows whose feature stays.
        """
        state = self._state
        manifest = state.manifest
        rows = np.ascontiguousarray(features, dtype=manifest.dtype)
        entries: list[Any] = [list(image) for image in images]
        if len(rows):
            checksums = state.log.blocks.of_rows(manifest.num_rows, rows)
            entries.append({"checksums": checksums})
            position = manifest.num_rows * manifest.dim * rows.dtype.itemsize
            self._append_bytes(manifest.features_file, position, rows.tobytes())
        if instead_of:
            entries.append({"removed": [int(row) for row in instead_of]})
        if replaced:
            changes = [[row, list(image)] for row, image in replaced.items()]
            entries.append({"replaced": changes})
        if not entries:
            return
        text = lines(entries)
        self._append_bytes(manifest.images_file, manifest.log_bytes, text)
        manifest = replace(
            manifest,
            num_rows=manifest.num_rows + len(rows),
            log_bytes=manifest.log_bytes + len(text),
            log_crc=zlib.crc32(text, manifest.log_crc),
        )
        self._write_manifest(manifest)
        for entry in entries:
            state.log.apply(entry)
        features_now = open_features(self.folder, manifest, state.log, state.features)
        self._state = Snapshot(manifest, state.log, features_now)

    def remove(self, rows: Sequence[int]) -> None:
        """Remove images.

        Args:
            rows: Rows of the images.
        """
        empty = np.zeros((0, self._state.manifest.dim), dtype=np.float32)
        self.append(empty, [], instead_of=rows)

    def set_approximate(self, approximate: dict[str, Any]) -> None:
        """Record the file of an approximate search, which replaces an earlier one.

        Args:
            approximate: Kind, file, number of rows, checksum and recall; empty for none.
        """
        state = self._state
        manifest = replace(state.manifest, approximate=approximate)
        self._write_manifest(manifest)
        self._state = Snapshot(manifest, state.log, state.features)
        self._remove_leftovers()

    def create_file(self, name: str) -> Path:
        """Prepare a new file, which neither exists nor is a link to another one.

        Args:
            name: Name of the file.

        Returns:
            Its path, which does not exist.
        """
        file = self.folder / name
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        return file

    def rewrite(self) -> None:
        """Rewrite the files without the removed rows, and with checksums."""
        state = self._state
        kept = np.flatnonzero(state.live)
        fresh = replace(
            state.manifest,
            num_rows=0,
            log_bytes=0,
            log_crc=0,
            generation=state.manifest.generation + 1,
            approximate={},
            format=FORMAT,
        )
        if state.manifest.approximate and state.live.all():  # the rows keep their numbers
            file = self.folder / state.manifest.approximate["file"]
            with contextlib.suppress(OSError):
                checksum = file_checksum(file)
                known = {"checksum": checksum, **state.manifest.approximate}
                fresh = replace(fresh, approximate=known)
        # The new files are not valid until the new manifest is written.
        log = Log()
        images = [state.images[row] for row in kept.tolist()]
        if not state.manifest.has_checksums:
            images = [_with_real_path(image) for image in images]
        entries: list[Any] = [list(image) for image in images]
        with open(self.create_file(fresh.features_file), "xb") as stream:
            for start in range(0, len(kept), _COPIED_ROWS):
                rows = state.features[kept[start : start + _COPIED_ROWS]]
                entries.append({"checksums": log.blocks.of_rows(start, rows)})
                stream.write(rows.tobytes())
            _flush(stream)
        text = lines(entries)
        with open(self.create_file(fresh.images_file), "xb") as stream:
            stream.write(text)
            _flush(stream)
        manifest = replace(
            fresh, num_rows=len(kept), log_bytes=len(text), log_crc=zlib.crc32(text)
        )
        self._write_manifest(manifest)
        for entry in entries:
            log.apply(entry)
        self._state = Snapshot(manifest, log, open_features(self.folder, manifest, log))
        self._remove_leftovers()

    def _read(self, before: Snapshot | None) -> Snapshot:
        """Read the index; another process may replace its files in the meantime."""
        for attempt in range(_ATTEMPTS):
            seen = self._signature()
            manifest = Manifest.read(self.folder)
            try:
                state = self._read_files(manifest, before)
            except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
                if seen != self._signature() and attempt + 1 < _ATTEMPTS:
                    continue
                raise DamagedFileError(
                    f"the index in {self.folder} is damaged: {error}. {_REMEDY}"
                ) from error
            self._seen = seen
            return state
        raise AssertionError("unreachable")

    def _read_files(self, manifest: Manifest, before: Snapshot | None) -> Snapshot:
        """Read the files that a manifest names, or only what is new in them."""
        log, start, crc, features = Log(), 0, 0, None
        if before is not None and _continues(before.manifest, manifest):
            log, features = before.log, before.features
            start, crc = before.manifest.log_bytes, before.manifest.log_crc
        content = b""
        if manifest.log_bytes > start:
            with open(self.folder / manifest.images_file, "rb") as stream:
                stream.seek(start)
                content = stream.read(manifest.log_bytes - start)
        is_short = len(content) < manifest.log_bytes - start
        if is_short or (
            manifest.has_checksums and zlib.crc32(content, crc) != manifest.log_crc
        ):
            if start:  # the files were replaced by those of another index
                return self._read_files(manifest, None)
            what = "is too short" if is_short else "differs from what was written"
            raise ValueError(f"{manifest.images_file} {what}")
        log.read(content)
        if len(log.images) != manifest.num_rows:
            raise ValueError(f"{manifest.images_file} does not list every row")
        if max(log.removed, default=0) > max(0, manifest.num_rows - 1):
            raise ValueError(f"{manifest.images_file} removes rows that do not exist")
        features = open_features(self.folder, manifest, log, features)
        return Snapshot(manifest, log, features)

    def _write_manifest(self, manifest: Manifest) -> None:
        manifest.write(self.folder)
        self._seen = self._signature()

    def _signature(self) -> tuple[int, ...]:
        """Return what differs whenever ``index.json`` was replaced; empty if it is gone."""
        try:
            status = os.stat(self.folder / MANIFEST)
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _has_hard_links(self) -> bool:
        """Return whether a file that grows has a second name, which would grow as well."""
        manifest = self._state.manifest
        for name in (manifest.features_file, manifest.images_file):
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(self.folder / name).st_nlink > 1:
                    return True
        return False

    def _remove_leftovers(self) -> None:
        """Remove files of earlier writes that the manifest does not name."""
        named = self._state.manifest.files
        for file in self.folder.iterdir():
            if is_own_file(file.name) and file.name not in named:
                # Windows keeps files that another process has open.
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    file.unlink()

    def _append_bytes(self, name: str, position: int, content: bytes) -> None:
        """Write after the valid part, over bytes that a killed process left there."""
        flags = os.O_RDWR | os.O_CREAT
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        file = self.folder / name
        try:
            descriptor = os.open(file, flags, 0o666)
            with open(descriptor, "r+b") as stream:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size < position:
                    raise DamagedFileError(
                        f"{file} was changed by another program. {_REMEDY}"
                    )
                stream.truncate(position)
                stream.seek(position)
                stream.write(content)
                _flush(stream)
        except OSError as error:
            raise FileWriteError(file, error) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """Lock a folder; say whom it waits for."""

    def report_wait() -> None:
        owner = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((folder / _OWNER).read_bytes())
            owner = f"process {known['pid']} on {known['host']}, since {known['started']}"
        logger.warning(
            "The index in %s is being changed by %s: waiting for at most %.0f s",
            *(folder, owner, _MAX_WAIT),
        )

    with exclusive(folder / _LOCK, on_wait=report_wait, timeout=_MAX_WAIT) as lock:
        yield lock


def _refuse_links(folder: Path, names: Sequence[str]) -> None:
    """Refuse to write where a symbolic link would lead out of the folder."""
    for name in names:
        file = folder / name
        if file.is_symlink():
            raise ValueError(
                f"{file} is a symbolic link to {os.readlink(file)}, which the index will "
                "not overwrite: remove the link, or create another index"
            )


def _continues(before: Manifest, now: Manifest) -> bool:
    """Return whether the files have only grown since."""
    return (
        (before.generation, before.dim, before.dtype, before.probe, before.format)
        == (now.generation, now.dim, now.dtype, now.probe, now.format)
        and before.log_bytes <= now.log_bytes
        and before.num_rows <= now.num_rows
    )


def _with_real_path(image: IndexedImage) -> IndexedImage:
    real = os.path.realpath(image.path)
    return image if real == image.path else image._replace(real=real)


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())

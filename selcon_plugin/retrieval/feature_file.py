"""Features of an index on disk, compared with their checksums when they are first read."""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.io.integrity import DamagedFileError

# Bytes per checksum: large enough for fast checks, and small enough that the few scattered
# rows that an approximate search reads do not need much more to be read.
_BLOCK_BYTES = 2**18


class Blocks:
    """Checksums of consecutive blocks of rows.

    Attributes:
        starts: First row of each block, ascending.
        crcs: CRC-32 of each block's bytes.
    """

    def __init__(self, starts: Sequence[int] = (), crcs: Sequence[int] = ()) -> None:
        self.starts = list(starts)
        self.crcs = list(crcs)

    def of_rows(self, first: int, rows: NDArray[Any]) -> list[Any]:
        """Compute the checksums of new rows.

        Args:
            first: Number of the first row.
            rows: The rows as they are stored, shape ``(n, D)``.

        Returns:
            Arguments of :meth:`add`: first row, rows per block, and checksums.
        """
        step = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
        crcs = [
            zlib.crc32(np.ascontiguousarray(rows[start : start + step]).tobytes())
            for start in range(0, len(rows), step)
        ]
        return [first, step, crcs]

    def add(self, first: int, step: int, crcs: Sequence[int]) -> None:
        """Add the checksums of rows that follow the known ones.

        Args:
            first: Number of the first row.
            step: Rows per block; the last block may be shorter.
            crcs: Checksum of each block.
        """
        self.starts += [first + step * number for number in range(len(crcs))]
        self.crcs += crcs


class FeatureFile:
    """Read-only array ``(N, D)`` on disk, whose rows are checked before they are used.

    Args:
        file: File of the rows.
        dtype: Type of the values.
        shape: Number of valid rows N, and dimension D.
        blocks: Checksums of the rows; None for an index without checksums.
        before: Array of the same file with fewer rows; what was checked remains so.

    Raises:
        DamagedFileError: If the file is too short.
    """

    def __init__(
        self,
        file: Path,
        dtype: str,
        shape: tuple[int, int],
        blocks: Blocks | None,
        before: FeatureFile | None = None,
    ) -> None:
        self.file = file
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._descriptor = -1
        self._rows: NDArray[Any] = np.zeros(shape if not shape[0] else 0, dtype=self.dtype)
        if shape[0]:
            with open(file, "rb") as stream:
                self._descriptor = os.dup(stream.fileno())
                weakref.finalize(self, os.close, self._descriptor)
                self._check_length()
                self._rows = np.memmap(stream, dtype=self.dtype, mode="r", shape=shape)
        self._starts = np.array([] if blocks is None else blocks.starts, dtype=np.int64)
        self._ends = np.append(self._starts[1:], shape[0])
        self._crcs = [] if blocks is None else list(blocks.crcs)
        self._checked = np.zeros(len(self._starts), dtype=bool)
        if before is not None:
            self._checked[: len(before._checked)] = before._checked

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[Any]) -> NDArray[Any]:
        """Return rows.

        Args:
            rows: Slice, or numbers of rows in ascending order.

        Raises:
            DamagedFileError: If rows differ from what was written.
        """  # noqa: DOC502  (raised by the functions called here)
        self._check_length()
        if not self._checked.all():
            numbers = np.arange(self.shape[0])[rows] if isinstance(rows, slice) else rows
            blocks = np.unique(np.searchsorted(self._starts, numbers, side="right") - 1)
            damaged = [b for b in blocks[~self._checked[blocks]] if not self._is_whole(b)]
            if damaged:
                raise self._damage(int(self._starts[damaged[0]]))
        found: NDArray[Any] = self._rows[rows]
        return found

    def damaged_rows(self) -> set[int]:
        """Read all rows that have not been checked yet, and return the damaged ones."""
        self._check_length()
        damaged: set[int] = set()
        for block in np.flatnonzero(~self._checked):
            if not self._is_whole(int(block)):
                damaged.update(range(int(self._starts[block]), int(self._ends[block])))
        return damaged

    def _is_whole(self, block: int) -> bool:
        rows = self._rows[self._starts[block] : self._ends[block]]
        self._checked[block] = zlib.crc32(rows.tobytes()) == self._crcs[block]
        return bool(self._checked[block])

    def _check_length(self) -> None:
        """Refuse a file that was cut off, whose mapped rows would end the process."""
        if self._descriptor < 0:
            return
        needed = self.shape[0] * self.shape[1] * self.dtype.itemsize
        if os.fstat(self._descriptor).st_size < needed:
            raise DamagedFileError(f"{self.file.name} is too short")

    def _damage(self, row: int) -> DamagedFileError:
        return DamagedFileError(
            f"{self.file} is damaged: the features from row {row} on differ from what was "
            "written. Run selcon index again on the folders of the index, which computes "
            "damaged features again"
        )

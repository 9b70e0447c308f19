"""Fast hashes of the content of image files: names, sizes and times may stay the same."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase

from tqdm import tqdm

__all__ = ["MISSING", "content_hash", "content_hashes", "list_hash"]

# Stands for the hash of a file that cannot be read.
MISSING = ""

_WHOLE = 4 << 20  # bytes: a file up to this size is read whole, every person crop by far
_PART = 1 << 20  # bytes read at the start, in the middle and at the end of a larger file
_READERS = 8
_SILENT_SECONDS = 2.0  # no progress bar before this


def content_hash(path: str | os.PathLike[str]) -> str:
    """Hash the content of a file.

    A file of more than 4 MiB is read at its start, in its middle and at its end only, so
    that the time is bounded; its size is part of the hash.

    Args:
        path: Path of the file.

    Returns:
        16 hexadecimal digits; :data:`MISSING` if there is no such file or it cannot be
        read.
    """
    digest = hashlib.blake2b(digest_size=8)
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return MISSING
        with open(path, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(b"%d\n" % size)
            starts = [0, (size - _PART) // 2, size - _PART] if size > _WHOLE else [0]
            for start in starts:
                stream.seek(start)
                _update(digest, stream, _PART if size > _WHOLE else _WHOLE)
    except (OSError, ValueError):  # ValueError: a NUL character in the name
        return MISSING
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, stream: RawIOBase, count: int) -> None:
    while count > 0 and (chunk := stream.read(count)):
        digest.update(chunk)
        count -= len(chunk)


def content_hashes(
    paths: Sequence[str | os.PathLike[str]], *, progress: bool = True
) -> list[str]:
    """Hash the content of many files in parallel; see :func:`content_hash`.

    On two cores 13,000 person crops take about a second once they are in the file cache.

    Args:
        paths: Paths of the files.
        progress: Whether to show a bar on a terminal if it takes more than two seconds.

    Returns:
        The hash of each file, in the given order.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return list(
            tqdm(
                pool.map(content_hash, paths),
                total=len(paths),
                desc="reading images",
                unit="img",
                leave=False,
                delay=_SILENT_SECONDS,
                disable=None if progress else True,
            )
        )


def list_hash(hashes: Sequence[str]) -> str:
    """Return one hash of an ordered list of hashes or names.

    Args:
        hashes: For instance the result of :func:`content_hashes`.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for text in hashes:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()

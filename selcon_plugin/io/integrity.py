"""Checksums of files that are read back: a damaged file is noticed before its use.

Zip files (``torch.save``, ``.npz``) contain a CRC-32 of each record, which neither
``torch.load`` nor a memory map verifies: :func:`verify_zip` does. A JSON file may contain
its own checksum (:func:`sealed_json`), and so may each line of a file that grows by lines
of JSON. For any other file, store :func:`file_checksum` in a
file that is written after it. Files without checksums, of earlier versions, still load.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

__all__ = [
    "DamagedFileError",
    "file_checksum",
    "sealed_json",
    "unsealed_json",
    "verify_file",
    "verify_zip",
]

_CHUNK = 1 << 20  # bytes read at once
_SEAL = "checksum"
_RESTORE = "Restore a copy of it, or delete it"
_LIST = "its list of records"
# The end of a zip file: mark, disks, numbers of records, size, offset, length of a comment.
_END = struct.Struct("<4s4H2LH")
_NUMBER_IN_ZIP64 = 0xFFFF  # more records than the field can count
_IS_FOLDER = 0x10  # attribute of a record


class DamagedFileError(ValueError):
    """Error for a file whose content is not what was written; the message names it."""


def verify_zip(file: str | Path | IO[bytes], *, remedy: str = _RESTORE) -> None:
    """Verify the checksums of a zip file, such as of ``torch.save`` or ``numpy.savez``.

    A file that is no zip file has no checksums and is accepted: the reader decides. So is
    one that was written without checksums (``torch.serialization.set_crc32_options``).

    Args:
        file: Path, or an open binary file, whose position is kept.
        remedy: What the user can do about a damaged file; the end of the error message.

    Raises:
        DamagedFileError: If a record does not match its checksum.
        OSError: If the file cannot be read.
    """  # noqa: DOC502  (raised by the functions called here)
    if isinstance(file, (str, Path)):
        with open(file, "rb") as stream:
            verify_zip(stream, remedy=remedy)
        return
    position = file.tell()
    try:
        if file.read(4) != b"PK\x03\x04":
            return
        file.seek(position)
        damaged = _damaged_record(file)
    finally:
        file.seek(position)
    if damaged is not None:
        name = getattr(file, "name", "the file")
        raise DamagedFileError(
            f"{name} is damaged: {damaged} does not match its checksum. {remedy}"
        )


def _damaged_record(stream: IO[bytes]) -> str | None:
    """Return the first record that does not match its checksum, None if all match."""
    try:
        with zipfile.ZipFile(stream) as archive:
            records = archive.infolist()
            if not _is_complete(stream, records):
                return _LIST
            if records and not any(record.CRC for record in records):
                return None
            for record in records:
                # By record, not by name: a damaged name may be that of another one.
                with archive.open(record) as content:
                    while content.read(_CHUNK):
                        pass
    except zipfile.BadZipFile as error:
        return str(error).partition("'")[2].rstrip("'") or _LIST
    except Exception as error:
        # Damaged compressed data raise almost anything, an OSError without number as well.
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        return _LIST
    return None


def _is_complete(stream: IO[bytes], records: list[zipfile.ZipInfo]) -> bool:
    """Return whether the list of records is one that ``torch`` or ``numpy`` writes.

    The list itself has no checksum. A damaged bit in it may hide records, give one the name
    of another one, or turn one into a folder, whose content ``torch`` leaves unset.
    """
    stream.seek(-_END.size, os.SEEK_END)
    mark, *_, number, _, _, comment = _END.unpack(stream.read(_END.size))
    return (
        mark == b"PK\x05\x06"
        and comment == 0
        and number in (len(records), _NUMBER_IN_ZIP64)
        and len({record.filename for record in records}) == len(records)
        and not any(
            record.comment or record.is_dir() or record.external_attr & _IS_FOLDER
            for record in records
        )
    )


def file_checksum(file: str | Path) -> str:
    """Compute the checksum of a file's whole content.

    Args:
        file: Path of the file.

    Returns:
        Name of the algorithm and the value, ``"blake2b:..."``.

    Raises:
        OSError: If the file cannot be read.
    """  # noqa: DOC502  (raised by the functions called here)
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return f"blake2b:{digest.hexdigest()}"


def verify_file(file: str | Path, expected: str | None, *, remedy: str = _RESTORE) -> None:
    """Compare a file with its stored checksum.

    Args:
        file: Path of the file.
        expected: Result of :func:`file_checksum` when the file was written; None for a
            file of an earlier version, which has none.
        remedy: What the user can do about a damaged file; the end of the error message.

    Raises:
        DamagedFileError: If the content is another one.
        OSError: If the file cannot be read.
    """  # noqa: DOC502  (raised by the functions called here)
    if expected is not None and file_checksum(file) != expected:
        raise DamagedFileError(
            f"{os.fspath(file)} is damaged: its content does not match its checksum. "
            f"{remedy}"
        )


def sealed_json(content: dict[str, Any], *, indent: int | None = None) -> str:
    """Format a JSON object with a checksum of its own content.

    Args:
        content: Values by name, which JSON can represent.
        indent: Spaces before each level; None for one line.

    Returns:
        The object with the entry ``checksum`` and a newline.
    """
    return json.dumps({**content, _SEAL: _seal_of(content)}, indent=indent) + "\n"


def unsealed_json(
    text: str | bytes, file: str | Path, *, remedy: str = _RESTORE
) -> dict[str, Any]:
    """Parse a JSON object and verify its checksum.

    Args:
        text: Content of the file.
        file: Name of the file, for the error message.
        remedy: What the user can do about a damaged file; the end of the error message.

    Returns:
        The object without its checksum. An object of an earlier version has none.

    Raises:
        DamagedFileError: If the text is no JSON object, or does not match its checksum.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # includes bytes that are no UTF-8
        raise DamagedFileError(f"{file} is damaged: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(
            f"{file} is damaged: it holds {type(content).__name__}, not an object. {remedy}"
        )
    # A key that was damaged itself must not pass for a file without a checksum.
    seal = content.pop(_SEAL, None)
    if seal is None and _looks_sealed(text):
        seal = "damaged"
    if seal is not None and seal != _seal_of(content):
        raise DamagedFileError(
            f"{file} is damaged: its content does not match its checksum. {remedy}"
        )
    return content


def _looks_sealed(text: str | bytes) -> bool:
    """Return whether the text ends like :func:`sealed_json`: with a digest of 32 digits."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return b'": "blake2b:' in raw[-64:]


def _seal_of(content: dict[str, Any]) -> str:
    # JSON has neither tuples nor keys that are numbers.
    content = json.loads(json.dumps(content))
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"blake2b:{hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()}"

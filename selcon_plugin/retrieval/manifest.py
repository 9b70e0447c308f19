"""``index.json``: what an index consists of, and how much of its files is valid."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.integrity import DamagedFileError, sealed_json, unsealed_json

MANIFEST = "index.json"
FORMAT = 2
_FIRST_FORMAT = 1  # without checksums
_DTYPES = ("float16", "float32")
_REMEDY = "Remove the folder of the index, and create it again with selcon index"
_COUNTS = ("dim", "num_rows", "log_bytes", "log_crc", "generation")
_APPROXIMATE_FILE = re.compile(r"approximate-(hnsw|ivf)-\d+-\d+\.faiss")
_OWN_FILE = re.compile(rf"features-\d+\.bin|images-\d+\.jsonl|{_APPROXIMATE_FILE.pattern}")


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
        log_crc: CRC-32 of these bytes.
        generation: Number of times that the files were rewritten.
        approximate: Kind, file, number of rows, CRC-32 and measured recall of the
            approximate search, if any.
        format: Version of this layout.
    """

    dim: int
    dtype: str
    search: str
    network: dict[str, Any]
    probe: list[list[float]]
    num_rows: int = 0
    log_bytes: int = 0
    log_crc: int = 0
    generation: int = 0
    approximate: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def features_file(self) -> str:
        """Name of the file of features."""
        return f"features-{self.generation}.bin"

    @property
    def images_file(self) -> str:
        """Name of the file of images."""
        return f"images-{self.generation}.jsonl"

    @property
    def files(self) -> set[str]:
        """Names of all files of the index other than ``index.json``."""
        names = {self.features_file, self.images_file}
        return names | ({self.approximate["file"]} if self.approximate else set())

    @property
    def has_checksums(self) -> bool:
        """True if the files can be checked; those of earlier versions cannot."""
        return self.format != _FIRST_FORMAT

    def write(self, folder: Path) -> None:
        """Write or replace the manifest, with its own checksum.

        Args:
            folder: Folder of the index.
        """
        write_atomically(sealed_json(asdict(self)), folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of an index.

        Args:
            folder: Folder of the index.

        Returns:
            The manifest.

        Raises:
            FileNotFoundError: If there is no index.
            DamagedFileError: If the manifest is damaged.
            ValueError: If it is of a later version.
        """  # noqa: DOC501, DOC502  (raised by the functions called here)
        file = folder / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no index in {str(folder)!r}: create one with selcon index"
            )
        content = unsealed_json(file.read_bytes(), file, remedy=_REMEDY)
        version = content.get("format", _FIRST_FORMAT)
        if version not in (_FIRST_FORMAT, FORMAT):
            raise ValueError(
                f"{file} was written by another version of selcon_plugin (format "
                f"{version!r}): use that version, or create a new index"
            )
        try:
            manifest = cls(**content)
            manifest._check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise _damaged(file, str(error)) from error
        return manifest

    def _check(self) -> None:
        """Check the types, because names of files are made of these values."""
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}")
        if self.dtype not in _DTYPES or not self.dim:
            raise ValueError(f"features of {self.dim} values in {self.dtype!r}")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("network", "approximate") and not isinstance(value, dict):
                raise ValueError(f"{item.name} is no mapping")
        probe = np.array(self.probe, dtype=np.float32)
        if probe.ndim != 2 or not np.isfinite(probe).all():
            raise ValueError("probe is no table of numbers")
        if self.approximate:
            name = self.approximate["file"]
            if not _APPROXIMATE_FILE.fullmatch(name):
                raise ValueError(f"{name!r} is no file of an index")


def is_own_file(name: str) -> bool:
    """Return whether a file in the folder of an index may have been written by it."""
    return bool(_OWN_FILE.fullmatch(name))


def _damaged(file: Path, reason: str) -> DamagedFileError:
    return DamagedFileError(f"{file} is damaged: {reason}. {_REMEDY}")

"""Safe loading of untrusted tensor files: a pickle that would run code is refused.

``torch.load(weights_only=True)`` builds only tensors, numbers, text and containers. It is
the default only from torch 2.6 on, and the hosts call ``torch.load`` without it in many
places: :func:`data_only` enforces it for every call inside its context.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selcon_plugin.io.integrity import DamagedFileError, verify_zip

__all__ = ["data_only", "load_data", "loading_noted", "safe_extraction"]

# A file with less than this fraction of the model's tensors belongs to another model.
MIN_LOADED_RATIO = 0.5

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_torch_load = torch.load


def load_data(file: Any, map_location: Any = "cpu") -> Any:
    """Read a file written by ``torch.save`` without running code from it.

    The checksums in the file, which ``torch.load`` ignores, are verified.

    Args:
        file: Path, or an open binary file.
        map_location: Argument of ``torch.load``.

    Returns:
        Tensors, numbers, text and containers of them.

    Raises:
        ValueError: If the file contains anything else, or expands to more than its size;
            the message names the file.
        DamagedFileError: If it does not match its checksums; it is a ``ValueError``.
        OSError: If the file cannot be opened.
    """
    _refuse_zip_bomb(file)
    try:
        verify_zip(file)
        with _allow_command_lines():
            return _torch_load(file, map_location=map_location, weights_only=True)
    except (OSError, DamagedFileError):
        raise
    except Exception as error:
        # A damaged stream may raise any kind of error.
        raise ValueError(
            f"{_name(file)} cannot be read safely as weights or a checkpoint: "
            f"{_reason(error)}"
        ) from error


@contextmanager
def data_only() -> Iterator[None]:
    """Make every ``torch.load`` inside the context read only data, whatever its arguments.

    Yields:
        Nothing.
    """

    def load(f: Any, map_location: Any = None, *_: Any, **__: Any) -> Any:
        return load_data(f, map_location)

    before = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = before


@contextmanager
def loading_noted() -> Iterator[list[float]]:
    """Record how well the weights fit that a host loads inside without a check.

    Yields:
        For each ``load_state_dict`` inside, the fraction of the module's tensors found by
        name.
    """
    ratios: list[float] = []
    original = nn.Module.load_state_dict

    def load_state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(module, *args, **kwargs)
        ratios.append(1 - len(result.missing_keys) / max(1, len(module.state_dict())))
        return result

    nn.Module.load_state_dict = load_state_dict  # type: ignore[assignment, method-assign]
    try:
        yield ratios
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


@contextmanager
def safe_extraction() -> Iterator[None]:
    """Confine tar archives extracted inside the context to their target folder.

    Python supports this since 3.10.12 and 3.11.4.

    Yields:
        Nothing.
    """
    before = vars(tarfile.TarFile).get("extraction_filter")
    guard = getattr(tarfile, "data_filter", None)
    tarfile.TarFile.extraction_filter = guard and staticmethod(guard)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _refuse_zip_bomb(file: Any) -> None:
    """Refuse an archive whose directory states more bytes than the file has.

    PyTorch stores tensors without compression, one after another. A file that expands was
    written by another program, possibly to fill the memory of the reader.

    Raises:
        ValueError: If it expands.
    """
    expanded, size = _zip_sizes(file)
    if expanded > size:
        raise ValueError(
            f"{_name(file)} expands from {size:,} to {expanded:,} bytes, which no file of "
            "torch.save does: it is not read. If you trust it, unpack it and save its "
            "tensors with torch.save"
        )


def _zip_sizes(file: Any) -> tuple[int, int]:
    """Return the stated size of an archive's content and the file's; 0 for other files."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as stream:
            return _zip_sizes(stream)
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        return expanded, file.seek(0, io.SEEK_END)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return 0, 0  # PyTorch's former formats, or damaged: it has the reason
    finally:
        file.seek(start)


def _allow_command_lines() -> AbstractContextManager[Any]:
    """Allow checkpoints that contain their command line, such as those of MAE and DINO."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch < 2.5
        return contextlib.nullcontext()
    return torch.serialization.safe_globals([argparse.Namespace])


def _name(file: Any) -> str:
    return str(file if isinstance(file, (str, Path)) else getattr(file, "name", "the file"))


def _reason(error: Exception) -> str:
    """Return a short reason; torch's own message advises disabling the check."""
    named = _GLOBAL.search(str(error))
    if named:
        return (
            f"it names {named[1]}, which is not data: such a file can run code when it is "
            "loaded. Use a file that contains only tensors"
        )
    return "it is damaged, incomplete or another kind of file"

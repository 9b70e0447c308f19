"""Patches for both hosts: torchvision operators, NumPy types and safe checkpoints."""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from selcon_plugin.installing import install_command as install_needs

__all__ = [
    "HostMissingError",
    "MismatchError",
    "prepare_torchvision",
    "torchvision_is_patched",
]

logger = logging.getLogger(__name__)


# Attribute of functions that replace a host's; it prevents a second replacement.
PATCHED = "_selcon_patched"

# Schemas as torchvision's C++ library registers them.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_MISSING_OPERATOR = re.compile(r"operator torchvision::\w+ does not exist")


class HostMissingError(ImportError):
    """Error for a host that is not installed; the message holds the install commands."""

    def __init__(self, host: str, install_command: str) -> None:
        super().__init__(
            f"{host} is not installed. Install it with: {install_command}, and what it "
            f"needs with: {install_needs(f'{host}-deps')}",
            name=host,
        )
        self.install_command = install_command


class HostNeedsError(ModuleNotFoundError):
    """Error for a host that needs a missing module; the message holds the command."""

    def __init__(self, host: str, module: str | None) -> None:
        self.detail = f"{host} needs the module {module}, which is not installed"
        super().__init__(
            f"{self.detail}. Install what it needs with: {install_needs(f'{host}-deps')}",
            name=module,
        )


class MismatchError(ImportError):
    """Error for two installed packages that do not work together.

    Attributes:
        detail: What does not work, with the versions.
        install_command: Command that installs two that do.
    """

    def __init__(self, detail: str, install_command: str) -> None:
        super().__init__(f"{detail}. Install two that belong together: {install_command}")
        self.detail = detail
        self.install_command = install_command


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


@contextlib.contextmanager
def naming_what_is_missing(host: str) -> Iterator[None]:
    """Name the command that installs what a host needs, if its import misses a module.

    Both hosts are installed with --no-deps.

    Args:
        host: Name of the host's package.

    Yields:
        Nothing.

    Raises:
        HostNeedsError: If a module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise HostNeedsError(host, error.name) from error


# --- before a host is imported -----------------------------------------------------------

# Kept until the process ends: deleting it would unregister its operators.
_torchvision_library: Any = None


def prepare_torchvision() -> None:
    """Import torchvision; declare its operators only if it cannot be imported without that.

    Without it: ``import torchvision`` raises ``operator torchvision::nms does not exist``
    (then ``qnms``) if the wheel's compiled extension was built for another torch, as with
    the PyPI wheel (CUDA) next to a CPU build of torch. The hosts use only torchvision's
    transforms and model definitions, so declaring the operators is enough.

    The decision is torchvision's own failure, never the name of a file: an extension that
    loads after the declaration would register the operators a second time, and torchvision
    0.29 ends the process then.
    Can be removed when: torchvision imports without its compiled extension.

    Raises:
        MismatchError: If torchvision is installed, but cannot be imported at all.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        _import_torchvision()
    except Exception as error:  # of torch, of torchvision, or of the dynamic loader
        if not _MISSING_OPERATOR.search(str(error)):
            raise MismatchError(*_torchvision_gap(error)) from error
        _declare_torchvision_operators()
        try:
            _import_torchvision()
        except Exception as second:
            raise MismatchError(*_torchvision_gap(second)) from second


def _torchvision_gap(cause: Exception) -> tuple[str, str]:
    reason = " ".join(str(cause).split())
    return (
        f"torchvision {_version_of('torchvision')} cannot be imported next to torch "
        f"{torch.__version__} ({type(cause).__name__}: {reason})",
        "pip install --upgrade torch torchvision",
    )


def _import_torchvision() -> None:
    # A failed import leaves the submodules behind that were complete, and their state.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    importlib.import_module("torchvision")


def _declare_torchvision_operators() -> None:
    global _torchvision_library
    for schema in _TORCHVISION_SCHEMAS:
        if hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            continue  # another library has already declared it
        if _torchvision_library is None:
            library: Any = torch.library.Library
            _torchvision_library = library("torchvision", "FRAGMENT")
        _torchvision_library.define(schema)


def torchvision_is_patched() -> bool:
    """Return whether torchvision runs without its compiled extension in this process."""
    return _torchvision_library is not None


def restore_numpy_bool() -> None:
    """Provide ``numpy.bool``.

    Without it: the CUHK03 protocol of both hosts (``eval_cuhk03``) raises
    ``AttributeError: module 'numpy' has no attribute 'bool'`` under NumPy 1.24 to 1.26.
    NumPy 2 has the name again.
    Can be removed when: NumPy 1 is no longer supported here.
    """
    with warnings.catch_warnings():
        # NumPy 1.20 to 1.23 have the name and warn about its removal.
        warnings.simplefilter("ignore")
        present = hasattr(np, "bool")
    if not present:
        np.__dict__["bool"] = np.bool_


def allow_numpy_in_checkpoints() -> None:
    """Let ``torch.load`` read the NumPy scalars that the hosts write into checkpoints.

    Without it: resuming raises ``WeightsUnpickler error: Unsupported global``: the package,
    and ``torch.load`` from torch 2.6 on, accept only tensors and plain Python values;
    torchreid stores Rank-1 as ``numpy.float32`` in every checkpoint, and FastReID's
    checkpointer accepts weights stored as arrays. Only the classes needed to rebuild
    scalars and plain arrays are allowed: an untrusted checkpoint still cannot run code.
    Can be removed when: the hosts store only floats and tensors.
    """
    if _loads_numpy_numbers():
        return
    multiarray: Any = importlib.import_module(_numpy_core() + ".multiarray")
    # codecs.encode: torch 2.4 and 2.5 do not yet allow what Python 2's protocol needs for
    # the bytes of a number.
    allowed: list[Any] = [np.dtype, np.ndarray, codecs.encode]
    allowed += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8")]
    allowed += [type(np.dtype(kind)) for kind in ("u1", "u2", "u4", "u8", "?")]
    # NumPy 2 renamed numpy.core to numpy._core; a file may use either name.
    for core in ("numpy.core", "numpy._core"):
        for function in (multiarray.scalar, multiarray._reconstruct):
            allowed.append(_under_name(function, f"{core}.multiarray"))
    torch.serialization.add_safe_globals(allowed)


def _under_name(function: Any, module: str) -> Any:
    """Return a function under the name of a module that a file may use for it."""

    @functools.wraps(function)
    def named(*args: Any) -> Any:
        return function(*args)

    # torch 2.4 and 2.5 take no pair of an object and its name.
    named.__module__, named.__qualname__ = module, function.__name__
    return named


def _numpy_core() -> str:
    return "numpy._core" if hasattr(np, "_core") else "numpy.core"


def _loads_numpy_numbers() -> bool:
    buffer = io.BytesIO()
    torch.save({"number": np.float64(0.5), "array": np.zeros(2, np.float32)}, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception:  # torch raises pickle's or its own error, by version
        return False
    return True

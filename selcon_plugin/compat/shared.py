"""Patches for both hosts: torchvision operators, NumPy types and safe checkpoints."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import io
import logging
import sys
import warnings
from typing import Any

import numpy as np
import torch

__all__ = [
    "HostMissingError",
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


class HostMissingError(ImportError):
    """Error for a host that is not installed; the message holds the install command."""

    def __init__(self, host: str, install_command: str) -> None:
        super().__init__(
            f"{host} is not installed. Install it with: {install_command}", name=host
        )
        self.install_command = install_command


# --- before a host is imported -----------------------------------------------------------

# Kept until the process ends: deleting it would unregister its operators.
_torchvision_library: Any = None


def prepare_torchvision() -> None:
    """Make torchvision importable if its compiled extension cannot be loaded.

    Without it: ``import torchvision`` raises ``operator torchvision::nms does not exist``
    (then ``qnms``) if the wheel's compiled extension was built for another torch, as with
    the PyPI wheel (CUDA) next to a CPU build of torch. The hosts use only torchvision's
    transforms and model definitions, so declaring the operators is enough.
    Can be removed when: torchvision imports without its compiled extension.
    """
    global _torchvision_library
    if "torchvision" in sys.modules or _torchvision_operators_load():
        return
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


def _torchvision_operators_load() -> bool:
    """Return whether torchvision's compiled extension loads, if torchvision has one."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.submodule_search_locations is None:
        return True  # nothing to patch
    locations = list(package.submodule_search_locations)
    extension = importlib.machinery.PathFinder.find_spec("_C", locations)
    if extension is None or extension.origin is None:
        return False
    operators: Any = torch.ops
    try:
        operators.load_library(extension.origin)
    except (OSError, RuntimeError):
        return False
    return True


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

    Without it: resuming raises ``WeightsUnpickler error: Unsupported global`` under
    torch >= 2.6, whose ``torch.load`` by default accepts only tensors and plain Python
    values. torchreid stores Rank-1 as ``numpy.float32`` in every checkpoint, and FastReID's
    checkpointer accepts weights stored as arrays. Only the classes needed to rebuild
    scalars and plain arrays are allowed: an untrusted checkpoint still cannot run code.
    Can be removed when: the hosts store only floats and tensors.
    """
    if not hasattr(torch.serialization, "add_safe_globals") or _loads_numpy_numbers():
        return
    multiarray: Any = importlib.import_module(_numpy_core() + ".multiarray")
    allowed: list[Any] = [np.dtype, np.ndarray]
    allowed += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8")]
    allowed += [type(np.dtype(kind)) for kind in ("u1", "u2", "u4", "u8", "?")]
    # NumPy 2 renamed numpy.core to numpy._core; a file may use either name.
    for core in ("numpy.core", "numpy._core"):
        allowed.append((multiarray.scalar, f"{core}.multiarray.scalar"))
        allowed.append((multiarray._reconstruct, f"{core}.multiarray._reconstruct"))
    torch.serialization.add_safe_globals(allowed)


def _numpy_core() -> str:
    return "numpy._core" if hasattr(np, "_core") else "numpy.core"


def _loads_numpy_numbers() -> bool:
    buffer = io.BytesIO()
    torch.save({"number": np.float64(0.5), "array": np.zeros(2, np.float32)}, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer)
    except Exception:  # torch raises pickle's or its own error, by version
        return False
    return True

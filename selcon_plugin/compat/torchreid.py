"""Shims that let torchreid run on current PyTorch, from PyPI or from GitHub.

Each says what fails without it and when it can go.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import time
import types
from typing import Any

from selcon_plugin.compat.shared import (
    _PATCHED,
    HostMissingError,
    _allow_numpy_in_checkpoints,
    _restore_numpy_bool,
    prepare_torchvision,
)
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.io.safe_loading import data_only

TORCHREID_INSTALL = "pip install --no-deps torchreid==0.2.5"


def prepare_torchreid() -> None:
    """Make ``import torchreid`` work, whichever of its two layouts is installed.

    Raises:
        HostMissingError: If torchreid is not installed.
    """
    if importlib.util.find_spec("torchreid") is None:
        raise HostMissingError("torchreid", TORCHREID_INSTALL)
    prepare_torchvision()
    _restore_numpy_bool()
    _allow_numpy_in_checkpoints()


def import_torchreid() -> types.ModuleType:
    """Import torchreid and return the module under which its parts are reachable.

    The PyPI release keeps everything under ``torchreid.reid``, the GitHub release
    directly under ``torchreid``. Where it is not installed, ``HostMissingError`` says how
    to install it.

    Returns:
        The module that has ``data``, ``engine``, ``losses``, ``metrics``, ``models``,
        ``optim`` and ``utils`` as attributes.
    """
    prepare_torchreid()
    root = "torchreid"
    if importlib.util.find_spec("torchreid.reid") is not None:
        root = "torchreid.reid"
    module = importlib.import_module(root)
    _let_unreadable_images_fail(module)
    _load_torchreid_checkpoints_as_data(module)
    return module


_READ_PAUSES = (0.0, 1.0, 2.0)  # seconds before each try


def _let_unreadable_images_fail(torchreid: types.ModuleType) -> None:
    """Let torchreid give up on an image that cannot be read.

    Without it: a run that meets a broken image file, in a test set for instance, neither
    goes on nor ends. ``read_image`` tries again without a pause until it succeeds, and
    prints a line each time. A file on a network drive still gets three tries.
    Can go when: torchreid's ``read_image`` raises its error.
    """
    original = getattr(torchreid.utils, "read_image", None)
    if original is None or hasattr(original, _PATCHED):
        return
    if "while not " not in inspect.getsource(original):
        return  # a reader that does not wait for success

    @functools.wraps(original)
    def read_image(path: str) -> Any:
        for pause in _READ_PAUSES:
            time.sleep(pause)
            try:
                return read_rgb(path)
            except OSError as error:
                fault = error
        raise OSError(f"{path} cannot be read as an image: {fault}") from fault

    setattr(read_image, _PATCHED, True)
    for part in ("utils", "utils.tools", "data.datasets.dataset"):
        sys.modules[f"{torchreid.__name__}.{part}"].__dict__["read_image"] = read_image


def _load_torchreid_checkpoints_as_data(torchreid: types.ModuleType) -> None:
    """Let torchreid read checkpoints and weights without running code from them.

    Without it: ``load_checkpoint``, and with it ``load_pretrained_weights``,
    ``resume_from_checkpoint`` and ``FeatureExtractor``, run code that a file brings along
    under torch < 2.6, where ``torch.load`` does so by default.
    Can go when: torchreid passes ``weights_only=True``.
    """
    original = getattr(torchreid.utils, "load_checkpoint", None)
    if original is None or hasattr(original, _PATCHED):
        return

    @functools.wraps(original)
    def load_checkpoint(fpath: str) -> Any:
        with data_only():
            return original(fpath)

    setattr(load_checkpoint, _PATCHED, True)
    for part in ("utils", "utils.torchtools"):
        sys.modules[f"{torchreid.__name__}.{part}"].__dict__["load_checkpoint"] = (
            load_checkpoint
        )

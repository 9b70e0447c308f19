"""Patches that let torchreid, from PyPI or GitHub, run on current PyTorch.

Each one documents what fails without it and when it can be removed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from selcon_plugin.compat.shared import (
    PATCHED,
    HostMissingError,
    allow_numpy_in_checkpoints,
    naming_what_is_missing,
    prepare_torchvision,
    restore_numpy_bool,
)
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.io.safe_loading import data_only

TORCHREID_INSTALL = "pip install --no-deps torchreid==0.2.5"


def prepare_torchreid() -> None:
    """Make ``import torchreid`` work for either of its two layouts.

    Raises:
        HostMissingError: If torchreid is not installed.
        MismatchError: If torchvision does not work with the installed torch.
    """  # noqa: DOC502  (raised by the functions called here)
    if importlib.util.find_spec("torchreid") is None:
        raise HostMissingError("torchreid", TORCHREID_INSTALL)
    prepare_torchvision()
    restore_numpy_bool()
    allow_numpy_in_checkpoints()


def import_torchreid() -> types.ModuleType:
    """Import torchreid and return the module that contains its subpackages.

    The PyPI release has its subpackages under ``torchreid.reid``, the GitHub release
    directly under ``torchreid``. If torchreid is not installed, the ``HostMissingError``
    contains the install command.

    Returns:
        The module with the attributes ``data``, ``engine``, ``losses``, ``metrics``,
        ``models``, ``optim`` and ``utils``.

    Raises:
        HostNeedsError: If a module that it imports is not installed.
    """  # noqa: DOC502  (raised by the functions called here)
    prepare_torchreid()
    root = "torchreid"
    if importlib.util.find_spec("torchreid.reid") is not None:
        root = "torchreid.reid"
    with naming_what_is_missing("torchreid"):
        module = importlib.import_module(root)
    _let_unreadable_images_fail(module)
    _load_torchreid_checkpoints_as_data(module)
    return module


def replace_function(
    module: types.ModuleType, name: str, replacement: Callable[..., Any]
) -> None:
    """Replace a function everywhere, also where it was imported before.

    The function object stays and gets another code, which calls the replacement.

    Args:
        module: Module that defines the function.
        name: Name of the function.
        replacement: Called with the original function before the arguments.
    """
    function = getattr(module, name, None)
    if function is None or hasattr(function, PATCHED):
        return
    original = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__
    )
    hook = f"_selcon_{name}"
    module.__dict__[hook] = functools.partial(replacement, original)
    function.__code__ = _call.__code__.replace(co_names=(hook,), co_name=name)
    function.__defaults__ = None
    setattr(function, PATCHED, True)


def _call(*args: Any, **kwargs: Any) -> Any:
    return replace_function(*args, **kwargs)  # by another name, in the code that is used


_READ_PAUSES = (0.0, 1.0, 2.0)  # seconds before each attempt


def _let_unreadable_images_fail(torchreid: types.ModuleType) -> None:
    """Make torchreid read images as the plugin does, and raise for an unreadable one.

    Without it: a run that encounters a broken image file, for instance in a test set, hangs
    forever. ``read_image`` retries without a pause until it succeeds, and prints a line
    each time. A file on a network drive still gets three attempts. Turned, transparent and
    16-bit images would have other pixels in a test set than in the training, and EPS files
    would start Ghostscript.
    Can be removed when: torchreid's data sets accept a reader.
    """
    original = getattr(torchreid.utils, "read_image", None)
    if original is None or hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def read_image(path: str) -> Any:
        for pause in _READ_PAUSES:
            time.sleep(pause)
            try:
                return read_rgb(path)
            except OSError as error:
                fault = error
        raise OSError(f"{path} cannot be read as an image: {fault}") from fault

    setattr(read_image, PATCHED, True)
    for part in ("utils", "utils.tools", "data.datasets.dataset"):
        sys.modules[f"{torchreid.__name__}.{part}"].__dict__["read_image"] = read_image


def _load_torchreid_checkpoints_as_data(torchreid: types.ModuleType) -> None:
    """Make torchreid read checkpoints and weights without running code from them.

    Without it: ``load_checkpoint``, and thereby ``load_pretrained_weights``,
    ``resume_from_checkpoint`` and ``FeatureExtractor``, run code contained in a file under
    torch < 2.6, where ``torch.load`` does so by default.
    Can be removed when: torchreid passes ``weights_only=True``.
    """

    def load_checkpoint(original: Callable[..., Any], fpath: str) -> Any:
        with data_only():
            return original(fpath)

    tools = getattr(torchreid.utils, "torchtools", torchreid.utils)
    replace_function(tools, "load_checkpoint", load_checkpoint)

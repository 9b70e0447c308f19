"""Settings of a script's run, for comparison with those that it is resumed with."""

from __future__ import annotations

from collections import Counter
from typing import Any

from selcon_plugin.runs.settings import plain_settings

# What changes while a run trains, or with its number of epochs.
_MOVING = ("last_epoch", "T_max", "total_iters", "verbose")


def host_settings(optimizer: Any, scheduler: Any, datamanager: Any) -> dict[str, Any]:
    """Describe the objects that a script builds with torchreid.

    Args:
        optimizer: Optimizer of the model.
        scheduler: Learning-rate schedule, or None.
        datamanager: torchreid's data manager.

    Returns:
        Numbers and names by name.
    """
    found: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        **{f"optimizer.{name}": value for name, value in optimizer.defaults.items()},
        "scheduler": type(scheduler).__name__,
        "data.height": getattr(datamanager, "height", None),
        "data.width": getattr(datamanager, "width", None),
        "data.transforms": _names_of(getattr(datamanager, "transform_tr", None)),
    }
    for name, value in vars(scheduler).items() if scheduler is not None else ():
        if isinstance(value, Counter):
            value = sorted(value.elements())
        if not name.startswith("_") and name not in _MOVING and _is_plain(value):
            found[f"scheduler.{name}"] = value
    return plain_settings(found)


def _names_of(transform: Any) -> list[str]:
    steps = getattr(transform, "transforms", [transform])
    return [type(step).__name__ for step in steps]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))

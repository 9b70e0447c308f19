"""Comparison of a run's settings with those that it is resumed with.

A run resumes only with the settings that it started with. The keys that may change are
those in :data:`CHANGEABLE`, because they change no weight of the epochs that are trained
already, or no weight at all.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from selcon_plugin.renamed import is_former_default, present_settings

__all__ = [
    "CHANGEABLE",
    "differing_settings",
    "fixed_settings",
    "flat_settings",
    "plain_settings",
    "shown_settings",
]

# By reason: patterns of full keys, in lower case, of every host and of the engines.
CHANGEABLE: dict[str, tuple[str, ...]] = {
    "the number of epochs may be extended": (
        *("solver.max_epoch", "train.max_epoch", "train.start_epoch"),
    ),
    "only files, log and display depend on it": (
        *("output_dir", "data.save_dir", "version", "solver.checkpoint_period"),
        *("*.checkpoint_period", "*.keep_checkpoints", "*.keep_best_by"),
        *("*.diagnostics_period", "*.report_images", "*.tensorboard_pictures"),
        *("train.print_freq", "solver.write_period"),
    ),
    "devices and processes": (
        *("model.device", "use_gpu", "gpu_devices", "cudnn_benchmark"),
        *("dataloader.num_workers", "data.workers"),
    ),
    "only the evaluation depends on it": (
        *("test.*", "datasets.tests", "data.targets", "*.test_camera_term"),
        "cuhk03.use_metric_cuhk03",
    ),
    "the images themselves are compared": (
        *("data.root", "*image_folder.root", "*.extra_images", "datasets.names"),
        *("data.sources", "model.heads.num_classes"),
    ),
    "the checkpoint replaces these weights": (
        *("model.weights", "model.load_weights", "model.resume", "model.pretrained"),
        *("model.backbone.pretrain", "model.backbone.pretrain_path", "selcon.weights"),
    ),
    "reaction to faults": (
        *("*.max_unreadable_ratio", "*.on_nonfinite", "*.max_nonfinite_steps"),
    ),
}
_PATTERNS = tuple(pattern for patterns in CHANGEABLE.values() for pattern in patterns)
_MOST_SHOWN = 8


def flat_settings(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config by their full keys, in plain types.

    Args:
        node: Config.
        prefix: Prefix of each key.

    Returns:
        See :func:`plain_settings`.
    """
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return plain_settings(flat)


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON and a checkpoint hold them.

    Args:
        settings: Values by full keys.

    Returns:
        Numbers, text, None, and lists and dicts of them, by the present names of the keys.
    """
    return {key: _plain(value) for key, value in present_settings(settings).items()}


def differing_settings(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    free: Sequence[str] = _PATTERNS,
) -> dict[str, tuple[Any, Any]]:
    """Find the settings that differ and must not.

    Args:
        then: Settings of the run, which may be of an earlier version.
        now: Settings that it is to be resumed with.
        free: Patterns of the keys that may differ, in lower case.

    Returns:
        Both values by full key. A key that only one of them has is left out: other versions
        have other keys. So is one that is unset now and had a default then: the method or
        labeler of the run does not have it.
    """
    then, now = plain_settings(then), plain_settings(now)
    return {
        key: (then[key], value)
        for key, value in now.items()
        if key in then
        and not _equal(then[key], value)
        and not _matches(key, free)
        and not (value is None and is_former_default(key, then[key]))
    }


def fixed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change when a run resumes.

    Args:
        settings: All settings by full keys.

    Returns:
        Those that :data:`CHANGEABLE` does not list. They name no place on this machine.
    """
    plain = plain_settings(settings)
    return {key: value for key, value in plain.items() if not _matches(key, _PATTERNS)}


def shown_settings(differing: Mapping[str, tuple[Any, Any]], then: str, now: str) -> str:
    """Format settings that differ, for one line.

    Args:
        differing: Result of :func:`differing_settings`.
        then: Words before the first value, for instance ``"was"``.
        now: Words before the second value, for instance ``"and is"``.

    Returns:
        Key and both values of each, separated by semicolons.
    """
    shown = [
        f"{key} {then} {a!r} {now} {b!r}"
        for key, (a, b) in list(differing.items())[:_MOST_SHOWN]
    ]
    more = len(differing) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more else [])])


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key.lower(), pattern) for pattern in patterns)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):  # a number of NumPy
        return value.item()
    return str(value)


def _equal(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a)
    return bool(a == b) or (both_nan and math.isnan(b))

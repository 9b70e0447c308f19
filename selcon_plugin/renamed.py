"""Names of earlier releases: still accepted, with a notice of the present name.

The tables below are the only place that knows them: options (and with them config keys, in
either host), their values and defaults, arguments of functions, metrics in files, and
tensors in checkpoints.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

# Options of a run and of methods: old name, new name.
OPTIONS = {
    "outlier_share": "outlier_ratio",
    "max_bad_share": "max_unreadable_ratio",
    "on_bad_numbers": "on_nonfinite",
    "max_bad_steps": "max_nonfinite_steps",
    "image_share": "image_weight",
    "part_share": "part_weight",
    "grey_feature_weight": "gray_feature_weight",
    "grey_cluster_weight": "gray_cluster_weight",
}
# By option: old value, new value.
VALUES = {"keep_best_by": {"outlier_share": "outlier_ratio"}}
# Defaults of earlier releases by option: the config that a run has written holds them also
# for options that its method or labeler does not have.
_FORMER_DEFAULTS: dict[str, tuple[Any, ...]] = {"num_clusters": (750,), "threshold": (0.8,)}
# Arguments of public functions.
_ARGUMENTS = OPTIONS | {
    "licence": "license",
    "exempt_positive": "ignored_positive",
    "exempt_negative": "ignored_negative",
    "band_share": "band_ratio",
}
# Metrics of metrics.json.
_METRICS = {
    "outlier_share": "outlier_ratio",
    "found_outlier_share": "found_outlier_ratio",
    "largest_cluster_share": "largest_cluster_ratio",
    "loss_grey": "loss_gray",
    "loss_grey_feature": "loss_gray_feature",
    "loss_grey_cluster": "loss_gray_cluster",
}
# Modules whose tensors a checkpoint holds.
_MODULES = {"grey_memory": "gray_memory"}

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")
_noticed: set[str] = set()


def accept_renamed(
    values: Mapping[str, Any],
    *,
    names: Mapping[str, str] = OPTIONS,
    format_key: Callable[[str], str] = str,
    label: Callable[[str], str] = str,
) -> dict[str, Any]:
    """Put options that were given by an earlier name, or value, under the present one.

    Args:
        values: Options by name, or by key.
        names: Present names by former ones.
        format_key: Writes an option's name as a key of ``values``.
        label: Writes a key for a message, for instance as a full config key.

    Returns:
        The values by present names, in the same order.

    Raises:
        ValueError: If both names of an option are set.

    Example:
        >>> accept_renamed({"outlier_share": 0.25, "seed": 1})
        {'outlier_ratio': 0.25, 'seed': 1}
    """
    names = {format_key(old): format_key(new) for old, new in names.items()}
    present = {format_key(name): by_old for name, by_old in VALUES.items()}
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(key, key)
        if value is None:
            # Unset, as are many keys of a config that a run has written.
            result.setdefault(name, values.get(name))
            continue
        if name != key:
            if values.get(name) is not None:
                raise ValueError(
                    f"{label(key)} and {label(name)} are two names of one option: leave "
                    f"out {label(key)}, the former one"
                )
            notice(label(key), label(name))
        by_old = present.get(name, {})
        if isinstance(value, str) and value in by_old:
            notice(f"{label(name)} {value}", f"{label(name)} {by_old[value]}")
            value = by_old[value]
        result[name] = value
    return result


def accept_old_arguments(
    function: Callable[_Params, _Result],
) -> Callable[_Params, _Result]:
    """Let a function take its keyword arguments by their earlier names as well.

    Args:
        function: Function with arguments by their present names.

    Returns:
        The function, with the same signature.
    """

    @functools.wraps(function)
    def call(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        return function(*args, **accept_renamed(kwargs, names=_ARGUMENTS))

    return call


def notice(old: str, new: str) -> None:
    """Log, once in a process, that a name has been replaced by another."""
    if old not in _noticed:
        _noticed.add(old)
        logger.warning("%s is deprecated: it is called %s now", old, new)


def present_value(option: str, value: Any) -> Any:
    """Return the present form of an option's value that a file holds; without a notice."""
    return VALUES.get(option, {}).get(value, value)


def is_former_default(key: str, value: Any) -> bool:
    """Return whether a value is the default that an earlier release gave to an option.

    Args:
        key: Name of the option, or a key that ends with it, in upper or lower case.
        value: Value of the key.
    """
    return value in _FORMER_DEFAULTS.get(key.rpartition(".")[2].lower(), ())


def present_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run measured by the present names; without a notice.

    Args:
        record: Metrics by name.

    Returns:
        The same, in the same order.
    """
    return {_METRICS.get(name, name): value for name, value in record.items()}


def present_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config by the present keys; without a notice.

    Args:
        settings: The config by full keys, of either host.

    Returns:
        The same, in the same order.
    """
    result = {}
    for key, value in settings.items():
        node, dot, name = key.rpartition(".")
        if node.lower() in ("model.selcon", "selcon"):
            present = OPTIONS.get(name.lower(), name.lower())
            value = present_value(present, value)
            name = present.upper() if name.isupper() else present
        result[f"{node}{dot}{name}"] = value
    return result


def rename_tensors(state: dict[str, Any], prefix: str) -> None:
    """Give the tensors of a checkpoint their present names; without a notice.

    Args:
        state: Tensors by name; changed in place.
        prefix: What stands before the module's own names.
    """
    for old, new in _MODULES.items():
        for name in [name for name in state if name.startswith(f"{prefix}{old}.")]:
            state[f"{prefix}{new}{name.removeprefix(prefix + old)}"] = state.pop(name)

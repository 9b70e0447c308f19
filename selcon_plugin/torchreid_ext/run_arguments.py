"""Checks of the arguments of torchreid's ``run`` before anything is trained.

torchreid reads most of them only when it needs them, some after the whole training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from selcon_plugin.options import Choice, Interval, option_table

logger = logging.getLogger(__name__)

DISTANCES = ("euclidean", "cosine")

_FROM_1 = Interval(1)
RUN_OPTIONS = option_table(
    {
        "max_epoch": (60, _FROM_1, "total number of epochs"),
        "start_epoch": (0, Interval(0), "epochs done before"),
        "print_freq": (
            20,
            _FROM_1,
            "batches between printed lines, if no progress bar is shown",
        ),
        "fixbase_epoch": (0, Interval(0), "epochs with frozen layers"),
        "start_eval": (0, Interval(0), "first epoch to evaluate after"),
        "eval_freq": (-1, Interval(-1), "epochs between evaluations"),
        "test_only": (False, None, "whether nothing is trained"),
        "dist_metric": ("euclidean", Choice(DISTANCES), "distance of the evaluation"),
        "normalize_feature": (False, None, "whether features are normalized"),
        "visrank": (False, None, "whether ranked results become pictures"),
        "visrank_topk": (10, _FROM_1, "ranked results in a picture"),
        "use_metric_cuhk03": (False, None, "whether CUHK03's metric is used"),
        "rerank": (False, None, "whether results are ranked again"),
    }
)
# Arguments that matter only for a training.
_OF_TRAINING = ("max_epoch", "start_epoch", "print_freq", "fixbase_epoch")
# Keys of torchreid's config by the argument that they become.
CONFIG_KEYS = {
    **{name: f"train.{name}" for name in (*_OF_TRAINING, "open_layers")},
    **{
        name: f"test.{name}"
        for name in (
            *("start_eval", "eval_freq", "dist_metric", "normalize_feature"),
            *("visrank", "visrank_topk", "ranks", "rerank"),
        )
    },
    "test_only": "test.evaluate",
    "use_metric_cuhk03": "cuhk03.use_metric_cuhk03",
}


def check_run_arguments(
    arguments: Mapping[str, Any], *, keys: Mapping[str, str] | None = None
) -> None:
    """Refuse valid arguments that do not belong together, and report those without effect.

    Args:
        arguments: Arguments of torchreid's ``run`` by name.
        keys: Names to use in error messages, such as config keys.

    Raises:
        ValueError: If two arguments exclude each other.
    """
    if arguments.get("test_only"):
        return
    names = {name: name for name in arguments} | dict(keys or {})
    if arguments.get("visrank"):
        raise ValueError(
            f"{names['visrank']} is True, but a training makes no pictures "
            f"of results: set it in an evaluation ({names.get('test_only', 'test_only')} "
            "True), or open the report of the run, which shows ranked queries"
        )
    if arguments.get("rerank"):
        logger.warning(
            "%s has no effect in a training: torchreid ranks again only in an evaluation "
            "(%s True)",
            names["rerank"],
            names.get("test_only", "test_only"),
        )
    frozen, epochs = arguments.get("fixbase_epoch", 0), arguments["max_epoch"]
    if frozen >= epochs and arguments.get("open_layers") is not None:
        logger.warning(
            "%s %d freezes layers in all of the %d epochs: lower it to train the whole "
            "network",
            names["fixbase_epoch"],
            frozen,
            epochs,
        )


def check_run_values(arguments: Mapping[str, Any]) -> None:
    """Refuse values of single arguments that are never valid.

    Args:
        arguments: Arguments of torchreid's ``run`` by name.

    Raises:
        ValueError: If a value is invalid; the message names the argument, the value and the
            valid values.
    """  # noqa: DOC502  (raised by the functions called here)
    trains = not arguments.get("test_only")
    for option in RUN_OPTIONS:
        if option.name in arguments and (trains or option.name not in _OF_TRAINING):
            option.check(arguments[option.name])
    if "ranks" in arguments:
        check_ranks("ranks", arguments["ranks"])


def check_ranks(key: str, ranks: Any) -> None:
    """Refuse ranks that are not a list of whole numbers from 1 on.

    Args:
        key: Name of the argument, for the error message.
        ranks: Value of the argument.

    Raises:
        ValueError: If it is something else.
    """
    valid = isinstance(ranks, Sequence) and not isinstance(ranks, str)
    if not valid or not all(_is_rank(rank) for rank in ranks):
        raise ValueError(
            f"{key} must be a list of whole numbers >= 1, such as [1, 5, 10], got {ranks!r}"
        )


def _is_rank(rank: Any) -> bool:
    return isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1


def check_start(start_epoch: int, max_epoch: int, trained: int | None) -> None:
    """Refuse to start a run at an epoch that its network was not trained for.

    Otherwise an untrained network would be trained for fewer epochs, or for none, and its
    results would be those of a whole run.

    Args:
        start_epoch: Epochs done before, by the caller.
        max_epoch: Total number of epochs.
        trained: Epochs that the network was trained for; None if unknown.

    Raises:
        ValueError: If it was trained for fewer, or the run is shorter.
    """
    if trained is not None and start_epoch > trained:
        state = f"was trained for {trained} epochs" if trained else "is not trained"
        raise ValueError(
            f"start_epoch is {start_epoch} of {max_epoch}, but the network {state}: resume "
            "the run (--resume or model.resume; in a script engine.resume(save_dir)), or "
            f"set start_epoch to {trained}"
        )
    if start_epoch > max_epoch:
        raise ValueError(
            f"start_epoch is {start_epoch}, beyond the end of a run of max_epoch "
            f"{max_epoch}: raise max_epoch to train on, or evaluate the checkpoint "
            "(test_only; selcon eval)"
        )

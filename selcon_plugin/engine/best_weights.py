"""Selection of a run's best weights by a label-free criterion.

A run without labels has no validation mAP to select by. The metrics that clustering
computes anyway can replace it; docs/benchmarks/market1501.md reports how reliable each of
them is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selcon_plugin.renamed import present_value
from selcon_plugin.runs.checkpoints import BadCheckpointError, read_checkpoint

logger = logging.getLogger(__name__)

NEVER = "none"
# Cluster metrics: 1 where the largest value is best, -1 where the smallest is.
SIGNS = {"outlier_ratio": -1, "stability": 1, "silhouette": 1, "cosine_silhouette": 1}
KEEP_BEST_BY = (NEVER, *SIGNS)
# The others say nothing of a network before training: its few clusters may be stable.
_OF_UNTRAINED = ("cosine_silhouette",)

BEST_FILE = "best_without_labels.pth"
# What to do where no epoch is better than the network before training.
NO_BETTER_REMEDY = (
    "A search across cameras may be better all the same: compare both on some labeled "
    "pairs. Otherwise train longer, lower the learning rate, start from a network that was "
    "trained on persons, or give --images-per-person"
)


class BestWeights:
    """Keeper of the weights of the epoch that is best by a label-free criterion.

    Its state is saved with each checkpoint, so that a resumed run still knows its best
    value.

    Args:
        criterion: One of ``KEEP_BEST_BY``, not ``NEVER``.
        save: Writes the current weights to a file, given the number of epochs trained and
            :meth:`state_dict`, which the file must contain as ``best``.
    """

    def __init__(self, criterion: str, save: Callable[[int, dict[str, Any]], None]) -> None:
        self.criterion = criterion
        self._sign = SIGNS[criterion]
        self._save = save
        self.value: float | None = None
        self.epochs = 0
        self.untrained: float | None = None

    def offer(self, measured: Mapping[str, float], epochs: int) -> None:
        """Save the current weights if they are the best so far.

        Args:
            measured: Metrics by name; nothing is saved if the criterion is missing.
            epochs: Epochs that these weights were trained for; the weights before training
                take part only if the criterion is comparable for them.
        """
        value = measured.get(self.criterion, math.nan)
        if not epochs:
            if self.criterion not in _OF_UNTRAINED:
                return
            self.untrained = value
        if not self._is_better(value):
            return
        self.value, self.epochs = value, epochs
        self._save(epochs, self.state_dict())
        logger.info("Best %s so far: %.4g, after %d epochs", self.criterion, value, epochs)

    def log_verdict(self) -> None:
        """Log whether the training has made the network better, at the end of a run."""
        if self.untrained is None or self.value is None:
            return
        change = f"{self.criterion} {self.untrained:.3f} before training"
        if self.epochs:
            logger.info(
                "%s, %.3f after %d epochs: those weights are kept in %s",
                change,
                self.value,
                self.epochs,
                BEST_FILE,
            )
        else:
            logger.warning(
                "%s, and no epoch is better: the training has not made the clusters of "
                "these images clearer, and %s holds the network as it was before. %s",
                change,
                BEST_FILE,
                NO_BETTER_REMEDY,
            )

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return self.value is None or self._sign * value > self._sign * self.value

    def restore_from(self, file: Path) -> None:
        """Restore the best value from the file of the best weights itself.

        A kill may fall between the writing of that file and of the next checkpoint: then
        the file knows a better value than the checkpoint.

        Args:
            file: File of the best weights; it may be absent or damaged.
        """
        try:
            state = read_checkpoint(file, ["best"])["best"]
        except FileNotFoundError:
            return
        except BadCheckpointError as error:  # or of an earlier version
            logger.warning("%s: the best weights may be written again", error)
            return
        value = state.get("value") if isinstance(state, Mapping) else None
        if isinstance(value, float) and self._is_better(value):
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the criterion, its best value so far with its epochs, and the first."""
        # "figure" is the key in checkpoints of all versions.  allow-phrase (a key)
        state = {"figure": self.criterion, "value": self.value}  # allow-phrase (a key)
        return {**state, "epochs": self.epochs, "untrained": self.untrained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the best value from a checkpoint that used the same criterion.

        Args:
            state: Result of :meth:`state_dict`; ignored if its criterion differs.
        """
        criterion = present_value("keep_best_by", state["figure"])  # allow-phrase (a key)
        if criterion == self.criterion and state["value"] is not None:
            self.value = float(state["value"])
            self.epochs = int(state.get("epochs", 0))
            self.untrained = state.get("untrained")

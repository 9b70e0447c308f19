"""Selection of a run's best weights by a label-free criterion.

A run without labels has no validation mAP to select by. The metrics that clustering
computes anyway can replace it; docs/benchmarks/market1501.md reports how reliable each of
them is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from selcon_plugin.renamed import present_value

logger = logging.getLogger(__name__)

NEVER = "none"
# Cluster metrics: 1 where the largest value is best, -1 where the smallest is.
SIGNS = {"outlier_ratio": -1, "stability": 1, "silhouette": 1}
KEEP_BEST_BY = (NEVER, *SIGNS)

BEST_FILE = "best_without_labels.pth"


class BestWeights:
    """Keeper of the weights of the epoch that is best by a label-free criterion.

    Its state is saved with each checkpoint, so that a resumed run still knows its best
    value.

    Args:
        criterion: One of ``KEEP_BEST_BY``, not ``NEVER``.
        save: Writes the current weights to a file, given the number of epochs trained.
    """

    def __init__(self, criterion: str, save: Callable[[int], None]) -> None:
        self.criterion = criterion
        self._sign = SIGNS[criterion]
        self._save = save
        self.value: float | None = None

    def offer(self, measured: Mapping[str, float], epochs: int) -> None:
        """Save the current weights if they are the best so far.

        Args:
            measured: Metrics by name; nothing is saved if the criterion is missing.
            epochs: Epochs that these weights were trained for.
        """
        value = measured.get(self.criterion, math.nan)
        if math.isnan(value) or (
            self.value is not None and self._sign * value <= self._sign * self.value
        ):
            return
        self.value = value
        self._save(epochs)
        logger.info("Best %s so far: %.4g, after %d epochs", self.criterion, value, epochs)

    def state_dict(self) -> dict[str, float | str | None]:
        """Return the criterion and its best value so far."""
        # "figure" is the key in checkpoints of all versions.  allow-phrase (a key)
        return {"figure": self.criterion, "value": self.value}  # allow-phrase (a key)

    def load_state_dict(self, state: Mapping[str, float | str | None]) -> None:
        """Restore the best value from a checkpoint that used the same criterion.

        Args:
            state: Result of :meth:`state_dict`; ignored if its criterion differs.
        """
        criterion = present_value("keep_best_by", state["figure"])  # allow-phrase (a key)
        if criterion == self.criterion and state["value"] is not None:
            self.value = float(state["value"])

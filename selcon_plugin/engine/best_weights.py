"""The best weights of a run, chosen without labels.

A run without labels has no validation mAP to choose by. What clustering measures anyway can
stand in for it: see docs/benchmarks/market1501.md for how well each figure does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from selcon_plugin.renamed import present_value

logger = logging.getLogger(__name__)

NEVER = "none"
# Figures of the clusters, and whether the largest is best, or the smallest.
SIGNS = {"outlier_ratio": -1, "stability": 1, "silhouette": 1}
KEEP_BEST_BY = (NEVER, *SIGNS)

BEST_FILE = "best_without_labels.pth"


class BestWeights:
    """Keeps the weights of the epoch at which a label-free figure was best.

    Its state is saved with each checkpoint: a resumed run goes on from its best figure.

    Args:
        figure: One of ``KEEP_BEST_BY``, not ``NEVER``.
        save: Writes the present weights to a file, given the epochs trained.
    """

    def __init__(self, figure: str, save: Callable[[int], None]) -> None:
        self.figure = figure
        self._sign = SIGNS[figure]
        self._save = save
        self.value: float | None = None

    def offer(self, measured: Mapping[str, float], epochs: int) -> None:
        """Save the present weights if their figure is the best so far.

        Args:
            measured: Figures by name; without the one that counts, nothing is saved.
            epochs: Epochs that these weights were trained for.
        """
        value = measured.get(self.figure, math.nan)
        if math.isnan(value) or (
            self.value is not None and self._sign * value <= self._sign * self.value
        ):
            return
        self.value = value
        self._save(epochs)
        logger.info("Best %s so far, %.4g, after %d epochs", self.figure, value, epochs)

    def state_dict(self) -> dict[str, float | str | None]:
        """Return the best figure so far."""
        return {"figure": self.figure, "value": self.value}

    def load_state_dict(self, state: Mapping[str, float | str | None]) -> None:
        """Go on from a checkpoint, unless it was by another figure.

        Args:
            state: What :meth:`state_dict` returned.
        """
        figure = present_value("keep_best_by", state["figure"])
        if figure == self.figure and state["value"] is not None:
            self.value = float(state["value"])

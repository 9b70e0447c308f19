"""The best weights of a run, chosen without labels.

A run without labels has no validation mAP to choose by. What clustering measures anyway can
stand in for it: see docs/benchmarks/market1501.md for how well each figure does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

NEVER = "none"
# The larger, the better, all of them.
CLUSTER_FIGURES = ("silhouette", "stability")
FEATURE_FIGURES = ("effective_rank", "embedding_variance")
KEEP_BEST_BY = (NEVER, *CLUSTER_FIGURES, *FEATURE_FIGURES)

BEST_FILE = "best_without_labels.pth"


class BestWeights:
    """Keeps the weights of the epoch at which a label-free figure was largest.

    Its state is saved with each checkpoint: a resumed run goes on from its best figure.

    Args:
        figure: One of ``CLUSTER_FIGURES`` and ``FEATURE_FIGURES``.
        save: Writes the present weights to a file, given the epochs trained.
    """

    def __init__(self, figure: str, save: Callable[[int], None]) -> None:
        self.figure = figure
        self._save = save
        self.value = float("-inf")

    def check(self, *, has_clusters: bool) -> None:
        """Refuse a figure that the run does not measure.

        Args:
            has_clusters: Whether the method clusters the images.

        Raises:
            ValueError: If it is a figure of clusters, and there are none.
        """
        if self.figure in CLUSTER_FIGURES and not has_clusters:
            raise ValueError(
                f"keep_best_by {self.figure} is a figure of clusters, and the method makes "
                f"none: choose {' or '.join(FEATURE_FIGURES)}"
            )

    def offer(self, measured: Mapping[str, float], epochs: int) -> None:
        """Save the present weights if their figure is the largest so far.

        Args:
            measured: Figures by name; without the one that counts, nothing is saved.
            epochs: Epochs that these weights were trained for.
        """
        value = measured.get(self.figure, float("-inf"))
        if not value > self.value:  # NaN included
            return
        self.value = value
        self._save(epochs)
        logger.info("Best %s so far, %.4g, after %d epochs", self.figure, value, epochs)

    def state_dict(self) -> dict[str, float | str]:
        """Return the best figure so far."""
        return {"figure": self.figure, "value": self.value}

    def load_state_dict(self, state: Mapping[str, float | str]) -> None:
        """Go on from a checkpoint, unless it was by another figure.

        Args:
            state: What :meth:`state_dict` returned.
        """
        if state["figure"] == self.figure:
            self.value = float(state["value"])

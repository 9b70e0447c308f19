"""What a host does in ``selcon demo``; the workflow asks for it step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.runs.ranked import LabeledImages

__all__ = ["Demo", "Ranking"]


@dataclass(frozen=True)
class Ranking:
    """An evaluation, with the distances that it ranked by.

    Attributes:
        metrics: Percentages by name.
        distance: Query to gallery, shape ``(Q, G)``.
        query: The Q queries.
        gallery: The G gallery images.
    """

    metrics: dict[str, float]
    distance: NDArray[np.float32]
    query: LabeledImages
    gallery: LabeledImages


class Demo(ABC):
    """The steps of the demo that are a host's.

    Attributes:
        run_files: Patterns of what the host's runs leave in their folder.
        free_keys: Beginnings of keys that may differ between the parts of one run.
        metrics_file: The host's file of measured values.
    """

    run_files: ClassVar[tuple[str, ...]]
    free_keys: ClassVar[tuple[str, ...]]
    metrics_file: ClassVar[str]

    @property
    @abstractmethod
    def test_set(self) -> str:
        """Name of the test set.

        Raises:
            ValueError: If the config names none, or several.
        """

    @property
    @abstractmethod
    def data(self) -> tuple[Path, SyntheticPersonsSpec] | None:
        """Folder of the data sets and what to render; None for other data."""

    @property
    @abstractmethod
    def data_name(self) -> str:
        """Name of the data, which changes with what renders it."""

    @abstractmethod
    def rank_untrained(self) -> Ranking:
        """Evaluate the backbone as it starts: pooled features, nothing learned."""

    @property
    @abstractmethod
    def epochs_trained(self) -> int:
        """Epochs of the run in the folder that are done; builds what trains."""

    @abstractmethod
    def train(self) -> None:
        """Train without labels, or finish a run; keep only the last checkpoint."""

    @abstractmethod
    def rank_trained(self) -> Ranking:
        """Evaluate the trained model."""

    @property
    @abstractmethod
    def schedule(self) -> tuple[int, int]:
        """Steps of an epoch, and steps of the warm-up."""

    @abstractmethod
    def write_results(self, metrics: dict[str, float]) -> None:
        """Write ``results.json`` with the metrics of the trained model."""

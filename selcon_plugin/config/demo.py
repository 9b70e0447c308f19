"""Interface for a host's steps of ``selcon demo``, which the workflow calls in order."""

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
    """Result of an evaluation, with the distances of its ranking.

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
    """Steps of the demo that depend on the host.

    Attributes:
        run_files: Patterns of the files that the host's runs write into their folder.
        free_keys: Prefixes of keys that may differ between the parts of one run.
        metrics_file: Name of the host's metrics file.
    """

    run_files: ClassVar[tuple[str, ...]]
    free_keys: ClassVar[tuple[str, ...]]
    metrics_file: ClassVar[str]

    @property
    @abstractmethod
    def test_set(self) -> str:
        """Name of the test set.

        Raises:
            ValueError: If the config does not name exactly one test set.
        """

    @property
    @abstractmethod
    def data(self) -> tuple[Path, SyntheticPersonsSpec] | None:
        """Folder of the data sets and specification of the persons; None for other data."""

    @property
    @abstractmethod
    def data_name(self) -> str:
        """Name of the data, which changes with the version of the renderer."""

    @abstractmethod
    def rank_untrained(self) -> Ranking:
        """Evaluate pooled features of the initial backbone, without any training."""

    @property
    @abstractmethod
    def epochs_trained(self) -> int:
        """Number of finished epochs of the run in the folder; builds the trainer."""

    @abstractmethod
    def train(self) -> None:
        """Train without labels, or finish a run; keep only the last checkpoint."""

    @abstractmethod
    def rank_trained(self) -> Ranking:
        """Evaluate the trained model."""

    @property
    @abstractmethod
    def schedule(self) -> tuple[int, int]:
        """Number of steps per epoch, and number of warm-up steps."""

    @abstractmethod
    def write_results(self, metrics: dict[str, float]) -> None:
        """Write ``results.json`` with the metrics of the trained model."""

"""A training run in the host's loop: what happens before it, each epoch, each step.

::

    run.before_training()
    for epoch in ...:
        run.start_epoch(epoch)             seeds
        run.renew_batches(epoch, step)     clusters, if it is time; batches drawn from them
        for batch in ...:
            run.start_step(step)           seeds
            losses, backward, step         the host's
            run.after_step()               banks, teacher
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from selcon_plugin.clustering import (
    Labeler,
    PseudoLabels,
    label_images,
    share_pseudo_labels,
)
from selcon_plugin.diagnostics import cluster_diagnostics, neighbor_precision
from selcon_plugin.distributed import rank
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method
from selcon_plugin.samplers import BatchStream, ClusterSampler

logger = logging.getLogger(__name__)


def seed_all(seed: int) -> None:
    """Seed the random streams of Python, NumPy and PyTorch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the hosts' transforms use the global stream)
    torch.manual_seed(seed)


def _seed_from(*numbers: int) -> None:
    seed_all(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@dataclass
class TrainingRun:
    """What the method wants done along a host's training loop.

    Random streams are seeded by ``(seed, epoch, rank)`` before each epoch and by ``(seed,
    step, rank)`` before each step, so that a run resumed at either goes on as the unbroken
    one would.

    Attributes:
        network: Network with its method.
        dataset: Training images.
        sampler: Draws the batches.
        labeler: Features to pseudo-labels; None for a method without clusters.
        extract: Computes the embeddings of all training images.
        calibrate: Makes fresh normalisation layers ready for them.
        seed: Seed of the run.
        cluster_period: Epochs from one clustering to the next.
        cluster_features: ``"global"`` or ``"fused"``: what is clustered.
        min_clusters: Clusters a batch needs.
        report: Takes what a clustering measured, by name; on the main process.
    """

    network: EmbeddingNetwork
    dataset: IndexedImages
    sampler: BatchStream
    labeler: Labeler | None
    extract: Callable[[], Embeddings]
    calibrate: Callable[[], object]
    seed: int = 0
    cluster_period: int = 1
    cluster_features: str = "global"
    min_clusters: int = 2
    report: Callable[[Mapping[str, float]], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        self._true_pids = self.dataset.known_pids

    @property
    def method(self) -> Method:
        """The network's method."""
        method = self.network.method
        assert method is not None
        return method

    def before_training(self) -> None:
        """Prepare what a checkpoint did not bring."""
        if self.method.prepared:
            return
        self.calibrate()
        self.network.update_teacher(restart=True)
        if not self.method.needs_clusters:
            self.method.prepare(self.extract(), self._camids())

    def start_epoch(self, epoch: int) -> None:
        """Tell the method and seed all random streams.

        Args:
            epoch: Counted from 0.
        """
        self.method.start_epoch(epoch)
        _seed_from(self.seed, epoch, rank())

    def start_step(self, step: int) -> None:
        """Seed all random streams.

        Args:
            step: Optimiser steps before this one.
        """
        # The 1 keeps this stream apart from the epochs'.
        _seed_from(self.seed, step, rank(), 1)

    def renew_batches(self, epoch: int, step: int, steps_done: int = 0) -> None:
        """Cluster the images if it is time, and draw this epoch's batches from the labels.

        Features of all training images (each rank extracts its share) are labelled on the
        main process; the labels go to all ranks and the method rebuilds its banks.

        Args:
            epoch: Counted from 0.
            step: Optimiser steps before this epoch.
            steps_done: Steps of it that an earlier part of the run did. Its labels are then
                those of the checkpoint.
        """
        if (
            self.labeler is not None
            and not steps_done
            and (not self.method.prepared or epoch % self.cluster_period == 0)
        ):
            self._cluster(epoch)
        if isinstance(self.sampler, ClusterSampler):
            self.sampler.set_labels(
                self.method.labels,
                self.dataset.camera_ids,
                start_batch=step,
                planner="shuffle" if self.method.instance_level else None,
            )
        self.sampler.start = step + steps_done

    def after_step(self) -> None:
        """Write the banks and move the teacher."""
        self.network.update_banks()
        self.network.update_teacher()

    def diagnostics(self) -> dict[str, float]:
        """Report what a user watches, from the last batch and the banks.

        The share of true matches among the chosen neighbours is reported if the data set
        has identities. Nothing flows back.

        Returns:
            Figures by name.
        """
        report = self.method.diagnostics()
        selected = self.method.selected_positives()
        if selected is not None and self._true_pids is not None:
            anchors, neighbors = selected
            report["neighbor_precision"] = neighbor_precision(
                anchors.cpu(), neighbors.cpu(), self._true_pids
            )
        return report

    def _camids(self) -> Tensor:
        return self.dataset.camera_ids.to(self.network.device)

    def _cluster(self, epoch: int) -> None:
        assert self.labeler is not None
        started = time.perf_counter()
        own = self.method.clustering_features() if self.method.prepared else None
        embeddings = self.extract() if own is None else Embeddings(own)
        extracted = time.perf_counter()
        features = embeddings.global_features
        if self.cluster_features == "fused":
            features = self.network.test_feature(embeddings)
        found = None
        if rank() == 0:
            found = label_images(
                self.labeler,
                features,
                self._camids(),
                min_clusters=self.min_clusters,
                previous=self.method.labels if self.method.prepared else None,
            )
        pseudo_labels = share_pseudo_labels(found, self.network.device)
        self.method.prepare(embeddings, self._camids(), pseudo_labels)
        seconds = {
            "extraction_seconds": extracted - started,
            "clustering_seconds": time.perf_counter() - extracted,
        }
        if rank() == 0:
            self._report(epoch, pseudo_labels, seconds)

    def _report(
        self, epoch: int, found: PseudoLabels, seconds: Mapping[str, float]
    ) -> None:
        report = {**found.measured, **seconds}
        if self._true_pids is not None:
            report |= cluster_diagnostics(found.labels, self._true_pids)
        # Undefined for these labels, and no number in JSON.
        report = {name: value for name, value in report.items() if not math.isnan(value)}
        self.report(report)
        logger.info(
            "Epoch %d: %s",
            epoch + 1,
            ", ".join(f"{name} {value:.4g}" for name, value in report.items()),
        )

"""Training run inside the host's loop: its work before training, per epoch and per step.

::

    run.before_training()
    for epoch in ...:
        run.start_epoch(epoch)                  seeds the random streams
        run.refresh_pseudo_labels(epoch, step)  clusters if it is due, then plans batches
        for batch in ...:
            run.start_step(step)                seeds the random streams
            take_step(...)                      losses, backward, weights if the guard
            allows run.after_step()                    updates banks and teacher
        run.end_epoch(epoch)                    reports unreadable images, checks the state
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
from selcon_plugin.clustering.remedies import more_clusters
from selcon_plugin.distributed import on_any_rank, rank, share_buffers
from selcon_plugin.engine.best_weights import BestWeights
from selcon_plugin.engine.console import log_summary
from selcon_plugin.engine.estimates import check_memory, clustering_estimate, product_rate
from selcon_plugin.engine.guard import StepGuard, zero_nonfinite_features
from selcon_plugin.engine.image_check import report_unreadable
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.engine.progress import Stage, duration
from selcon_plugin.engine.run_options import ClusteringOptions, RunOptions
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method
from selcon_plugin.metrics.collapse import (
    find_collapse_signs,
    measure_clusters,
    measure_spread,
)
from selcon_plugin.metrics.identities import cluster_diagnostics, neighbor_precision
from selcon_plugin.models.finite import check_state
from selcon_plugin.options import options_of
from selcon_plugin.runs.embedding import record_embedding
from selcon_plugin.runs.tensorboard import write_pictures
from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.stream import BatchStream

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
    """The steps that a method takes along a host's training loop.

    Random streams are seeded by ``(seed, epoch, rank)`` before each epoch and by ``(seed,
    step, rank)`` before each step, so that a run that resumes at either of them continues
    exactly as an uninterrupted one.

    Attributes:
        network: Network with its method.
        dataset: Training images.
        sampler: Samples the batches.
        labeler: Maps features to pseudo-labels; None for a method without clusters.
        extract: Computes the embeddings of all training images.
        calibrate: Calibrates new normalization layers before the first extraction.
        options: Options of the run.
        clustering: Options of the clustering.
        min_clusters: Number of clusters that a batch requires.
        folder: Folder for the data of the report; empty to keep none.
        report: Receives the metrics of a clustering by name, on the main process.
        best: Keeps the best weights by a label-free criterion, or None.
        guard: Checks each step before anything is written.
    """

    network: EmbeddingNetwork
    dataset: IndexedImages
    sampler: BatchStream
    labeler: Labeler | None
    extract: Callable[[], Embeddings]
    calibrate: Callable[[], object]
    options: RunOptions = field(default_factory=RunOptions)
    clustering: ClusteringOptions = field(default_factory=ClusteringOptions)
    min_clusters: int = 2
    folder: str = ""
    report: Callable[[Mapping[str, float]], None] = field(default=lambda _: None)
    best: BestWeights | None = None

    def __post_init__(self) -> None:
        if self.best is not None and self.labeler is None:
            logger.warning(
                "keep_best_by %s is a criterion of clusters, but the method does not "
                "cluster: no best weights are kept",
                self.best.criterion,
            )
            self.best = None
        self._evaluation_only_pids = self.dataset.evaluation_only_identities
        self.network.training_paths = self.dataset.paths
        self._clustering_seconds: float | None = None
        self.guard = StepGuard(
            self.network,
            self.dataset.paths,
            on_nonfinite=self.options.on_nonfinite,
            max_nonfinite_steps=self.options.max_nonfinite_steps,
        )

    @property
    def method(self) -> Method:
        """The network's method."""
        method = self.network.method
        assert method is not None
        return method

    def before_training(self) -> None:
        """Initialize the state that no checkpoint has restored.

        Raises:
            FloatingPointError: If loaded weights or banks contain NaN or infinity.
            ValueError: If there is too little memory to cluster the images.
        """  # noqa: DOC502  (raised by the functions called here)
        check_state(self.network, self.dataset.paths, when="before training")
        labeler = self.clustering.labeler if self.labeler is not None else ""
        log_summary(self.options.method, labeler, self.network, self.dataset.camera_ids)
        self._check_clustering()
        if self.method.prepared:
            return
        self.calibrate()
        self.network.update_teacher(restart=True)
        if not self.method.needs_clusters:
            self.method.prepare(self._extract()[0], self._camids())

    def _check_clustering(self) -> None:
        """Log the expected cost of each clustering; raise if memory is insufficient."""
        if self.labeler is None or rank() > 0:
            return
        device, dim = self.network.device, self.network.heads.global_dim
        expected = clustering_estimate(
            len(self.dataset),
            dim,
            k1=self.labeler.num_neighbors(len(self.dataset)),
            products_per_second=product_rate(dim, str(device)),
        )
        logger.info("Each clustering of %d images takes %s", len(self.dataset), expected)
        if device.type == "cpu":
            check_memory(expected, f"clustering {len(self.dataset):,} images")

    def start_epoch(self, epoch: int) -> None:
        """Notify the method of a new epoch, and seed all random streams.

        Args:
            epoch: Index of the epoch, counted from 0.
        """
        self.network.clear_pending()  # an error may have interrupted the last step
        self.method.start_epoch(epoch)
        _seed_from(self.options.seed, epoch, rank())

    def start_step(self, step: int) -> None:
        """Seed all random streams, and open the step of the network.

        Args:
            step: Number of optimizer steps before this one.
        """
        self.network.begin_step(self.options.micro_batches)
        # The 1 separates this stream from those of the epochs.
        _seed_from(self.options.seed, step, rank(), 1)

    def refresh_pseudo_labels(self, epoch: int, step: int, steps_done: int = 0) -> None:
        """Cluster the images if it is due, and plan this epoch's batches from the labels.

        Each rank extracts the features of its shard of the training images. The main
        process labels all of them, the labels go to all ranks, and the method rebuilds its
        banks.

        Args:
            epoch: Index of the epoch, counted from 0.
            step: Number of optimizer steps before this epoch.
            steps_done: Steps of this epoch that an earlier part of the run did. If there
                are any, the labels of the checkpoint are used.
        """
        if (
            self.labeler is not None
            and not steps_done
            and (not self.method.prepared or epoch % self.clustering.period == 0)
        ):
            self._cluster(epoch)
        if isinstance(self.sampler, ClusterSampler):
            self.sampler.set_labels(
                self.method.labels,
                self.dataset.camera_ids,
                start_batch=step,
                planner="shuffle" if self.method.instance_level else None,
            )
            self.dataset.labels = self.method.labels.cpu().numpy()
        self.sampler.start = step + steps_done

    def after_step(self) -> None:
        """Write the banks and update the teacher, unless the step is skipped."""
        if self.guard.skipped:
            self.network.clear_pending()
            return
        self.network.update_banks()
        self.network.update_teacher()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Report unreadable images, and check weights and banks before they are saved.

        For a method without clusters, this also checks the features for a collapse.

        Args:
            epoch: Index of the epoch, counted from 0.

        Returns:
            Metrics by name; empty for a method with clusters, whose clustering reports
            them, and on every process except the main one.

        Raises:
            FloatingPointError: If weights or banks contain NaN or infinity. ``ValueError``
                if too many images are unreadable.
        """  # noqa: DOC502  (raised by the functions called here)
        self._report_unreadable()
        self._share_statistics()
        check_state(self.network, self.dataset.paths, when=f"after epoch {epoch + 1}")
        features = self.method.image_features() if self.labeler is None else None
        if rank() > 0 or features is None:
            return {}
        spread = measure_spread(features)
        self._keep(features, None, epoch + 1)
        return self._watch(epoch, spread)

    def score_final_epoch(self, epochs: int) -> None:
        """Cluster once more after the last epoch, only to score its weights.

        The clusters at the start of an epoch score the weights of the previous one.

        Args:
            epochs: Number of epochs trained.
        """
        if self.best is None or self.labeler is None:
            return
        embeddings, usable = self._clustered_features()
        if rank() == 0:
            found = self._label(embeddings, usable)
            self._offer({**found.measured, **measure_clusters(found)}, epochs)
            self.best.log_verdict()

    def _offer(self, measured: Mapping[str, float], epochs: int) -> None:
        if self.best is None:
            return
        # One cluster of all images would win: it has no outliers and never changes.
        if not find_collapse_signs(measured, len(self.dataset)).clusters:
            self.best.offer(measured, epochs)

    def _watch(self, epoch: int, measured: dict[str, float]) -> dict[str, float]:
        """Warn if the features or the clusters show signs of a collapse."""
        signs = find_collapse_signs(measured, len(self.dataset))
        if not signs:
            return measured
        remedies = []
        if signs.clusters and self.labeler is not None:
            remedies.append(more_clusters(options_of(type(self.labeler))))
        if self.method.step == 0:
            logger.warning(
                "Before training the network hardly discriminates the images: %s. Start "
                "from pretrained weights%s",
                signs,
                "".join(f"; {remedy}" for remedy in remedies),
            )
            return measured
        if signs.features:
            remedies.insert(0, self.method.collapse_remedy)
        logger.warning(
            "Epoch %d: the representation has collapsed, or is about to: %s. Go back to an "
            "earlier checkpoint, or start over, and %s",
            epoch + 1,
            signs,
            "; ".join(remedies),
        )
        return measured

    def _report_unreadable(self) -> None:
        """Warn once about unreadable images; stop the run if there are too many."""
        report_unreadable(
            self.dataset,
            unreported=on_any_rank(self.dataset.pop_unreported()),
            unreadable=on_any_rank(self.dataset.unreadable),
            max_unreadable_ratio=self.options.max_unreadable_ratio,
            what_happened="other images replaced them, with their own labels",
        )

    def write_pictures(self, folder: str, step: int) -> None:
        """Write contact sheets and the embedding of the trained network to TensorBoard.

        Every rank extracts its shard; the main process writes.

        Args:
            folder: Folder of the run.
            step: Number of optimizer steps done.
        """
        embeddings, usable = self._extract()
        if rank() > 0:
            return
        kept = usable.nonzero().flatten().tolist()
        write_pictures(
            folder,
            [self.dataset.paths[i] for i in kept],
            [self.dataset.camids[i] for i in kept],
            embeddings.global_features[kept],
            self.method.labels[kept],
            step=step,
        )

    def diagnostics(self) -> dict[str, float]:
        """Return metrics of the last batch and the banks, for the log.

        If the data set has identities, the ratio of true matches among the selected
        neighbors is one of them. The training never uses these metrics.

        Returns:
            Metrics by name.
        """
        report = self.method.diagnostics()
        if self.guard.num_skipped:
            report["skipped_steps"] = float(self.guard.num_skipped)
        selected = self.method.selected_positives()
        if selected is not None and self._evaluation_only_pids is not None:
            anchors, neighbors = selected
            report["neighbor_precision"] = neighbor_precision(
                anchors.cpu(), neighbors.cpu(), self._evaluation_only_pids
            )
        return report

    def _extract(self) -> tuple[Embeddings, Tensor]:
        # Features of unreadable images and non-finite features become zero. The second
        # value marks the images that have features: bool (M,) on the CPU.
        self.dataset.reset_unreadable()
        self._share_statistics()
        embeddings, nonfinite = zero_nonfinite_features(
            self.extract(), self.dataset.paths, self.options.on_nonfinite
        )
        unreadable = on_any_rank(self.dataset.unreadable)
        if unreadable.any():
            report_unreadable(
                self.dataset,
                unreported=on_any_rank(self.dataset.pop_unreported()),
                unreadable=unreadable,
                max_unreadable_ratio=self.options.max_unreadable_ratio,
                what_happened="their features are zero, and they belong to no cluster",
            )
            rows = unreadable.nonzero().flatten().to(self.network.device)
            for features in (embeddings.global_features, embeddings.part_features):
                if features is not None:
                    features[rows] = 0
        usable = ~unreadable
        usable[nonfinite.cpu()] = False
        return embeddings, usable

    def _share_statistics(self) -> None:
        # Each rank's running statistics come from its own images. All ranks extract and
        # evaluate with those of rank 0, which the checkpoint holds.
        network = self.network
        share_buffers(network.backbone, network.heads, network.teacher)

    def _camids(self) -> Tensor:
        return self.dataset.camera_ids.to(self.network.device)

    def _clustered_features(self) -> tuple[Embeddings, Tensor]:
        own = self.method.clustering_features() if self.method.prepared else None
        if own is None:
            return self._extract()
        return Embeddings(own), torch.ones(len(self.dataset), dtype=torch.bool)

    def _cluster(self, epoch: int) -> None:
        started = time.perf_counter()
        embeddings, usable = self._clustered_features()
        extracted = time.perf_counter()
        last = self._clustering_seconds
        hint = f" ({duration(last)} last time)" if last is not None else ""
        with Stage(f"Clustering {len(self.dataset)} images{hint}"):
            found = self._label(embeddings, usable) if rank() == 0 else None
        pseudo_labels = share_pseudo_labels(found, self.network.device)
        self.method.prepare(embeddings, self._camids(), pseudo_labels)
        seconds = {
            "extraction_seconds": extracted - started,
            "clustering_seconds": time.perf_counter() - extracted,
        }
        self._clustering_seconds = seconds["clustering_seconds"]
        if rank() == 0:
            self._keep(embeddings.global_features, pseudo_labels, epoch)
            spread = self._watch(
                epoch,
                measure_spread(embeddings.global_features)
                | measure_clusters(pseudo_labels),
            )
            self._report(epoch, pseudo_labels, spread | seconds)

    def _keep(self, features: Tensor, found: PseudoLabels | None, epoch: int) -> None:
        """Write the data of the report; the training continues if that fails."""
        if not self.folder:
            return
        try:
            record_embedding(features, self.dataset.camera_ids, found, epoch=epoch).save(
                self.folder
            )
        except Exception as error:
            logger.warning("The data of the report could not be written: %s", error)

    def _label(self, embeddings: Embeddings, usable: Tensor) -> PseudoLabels:
        """Label the images that have features; the others belong to no cluster."""
        assert self.labeler is not None
        features, camids = embeddings.global_features, self._camids()
        if self.clustering.features == "fused":
            features = self.network.test_feature(embeddings)
        previous = self.method.labels if self.method.prepared else None
        if not usable.all():
            kept = usable.to(features.device)
            features, camids = features[kept], camids[kept]
            previous = None if previous is None else previous[kept]
        found = label_images(
            self.labeler,
            features,
            camids,
            min_clusters=self.min_clusters,
            previous=previous,
        )
        return found if usable.all() else found.among(usable)

    def _report(
        self, epoch: int, found: PseudoLabels, measured: Mapping[str, float]
    ) -> None:
        report = {**found.measured, **measured}
        if self._evaluation_only_pids is not None:
            report |= cluster_diagnostics(found.labels, self._evaluation_only_pids)
        # NaN means that a metric is undefined for these labels; JSON has no NaN.
        report = {name: value for name, value in report.items() if not math.isnan(value)}
        self.report(report)
        self._offer(report, epoch)
        logger.info(
            "Epoch %d: %s",
            epoch + 1,
            ", ".join(f"{name} {value:.4g}" for name, value in report.items()),
        )

"""``ClusteringHook``: clusters before an epoch, and everything that follows from them."""

from __future__ import annotations

import logging
import math
import time

import torch
from fastreid.config import CfgNode
from fastreid.engine.train_loop import HookBase
from fastreid.utils import comm

from selcon_plugin.clustering import (
    Labeler,
    PseudoLabels,
    label_images,
    share_pseudo_labels,
)
from selcon_plugin.diagnostics import cluster_diagnostics
from selcon_plugin.fastreid_ext.config import sampler_name
from selcon_plugin.fastreid_ext.data import IndexedDataset
from selcon_plugin.fastreid_ext.embedding import extract_training_set, unwrap
from selcon_plugin.fastreid_ext.hooks import known_pids
from selcon_plugin.features import fused_feature
from selcon_plugin.samplers import ClusterSampler

logger = logging.getLogger(__name__)


class ClusteringHook(HookBase):
    """Cluster the training images before every n-th epoch; draw batches from the clusters.

    Features of all training images (each rank extracts its share) are labelled on the main
    process; the labels go to all ranks, the method rebuilds its banks, the sampler draws
    from the new clusters, and the data iterator starts anew, so that no batch of the old
    labels follows.

    Args:
        cfg: Complete config.
        dataset: The training images.
        labeler: Features to pseudo-labels.
    """

    def __init__(self, cfg: CfgNode, dataset: IndexedDataset, labeler: Labeler) -> None:
        self._cfg = cfg
        self._dataset = dataset
        self._labeler = labeler
        self._true_pids = known_pids(dataset)

    def before_epoch(self) -> None:
        """Cluster if it is time, then set up the sampler for this epoch."""
        method = unwrap(self.trainer.model).method
        assert method is not None
        if not method.prepared or self.trainer.epoch % self._period == 0:
            self._cluster()
        sampler = self.trainer.data_loader.sampler
        if isinstance(sampler, ClusterSampler):
            sampler.set_labels(
                method.labels,
                torch.tensor(self._dataset.camids),
                start_batch=self.trainer.iter,
                planner="shuffle" if method.instance_level else None,
            )
            # The iterator has prefetched batches of the labels before.
            self.trainer.restart_data()

    @property
    def _period(self) -> int:
        period: int = self._cfg.MODEL.SELCON.CLUSTERING.PERIOD
        return period

    def _cluster(self) -> None:
        model = unwrap(self.trainer.model)
        method = model.method
        assert method is not None
        node = self._cfg.MODEL.SELCON
        started = time.perf_counter()
        embeddings = extract_training_set(self._cfg, model, self._dataset)
        extracted = time.perf_counter()
        camids = torch.tensor(self._dataset.camids, device=model.device)
        features = embeddings.global_features
        if node.CLUSTERING.FEATURES == "fused":
            features = fused_feature(
                embeddings, global_distance_weight=model.global_distance_weight
            )
        found = None
        if comm.is_main_process():
            found = label_images(
                self._labeler,
                features,
                camids,
                min_clusters=self._clusters_per_batch(),
                previous=method.labels if method.prepared else None,
            )
        pseudo_labels = share_pseudo_labels(found, model.device)
        method.prepare(embeddings, camids, pseudo_labels)
        seconds = {
            "extraction_seconds": extracted - started,
            "clustering_seconds": time.perf_counter() - extracted,
        }
        if comm.is_main_process():
            self._report(pseudo_labels, seconds)

    def _clusters_per_batch(self) -> int:
        if sampler_name(self._cfg) not in ("pk", "pk_camera", "proxy"):
            return 2
        images: int = self._cfg.SOLVER.IMS_PER_BATCH
        instances: int = self._cfg.DATALOADER.NUM_INSTANCE
        return images // instances

    def _report(self, found: PseudoLabels, seconds: dict[str, float]) -> None:
        report = {**found.measured, **seconds}
        if self._true_pids is not None:
            report |= cluster_diagnostics(found.labels, self._true_pids)
        # Undefined for these labels, and no number in JSON.
        report = {name: value for name, value in report.items() if not math.isnan(value)}
        # The storage still stands at the last step, which has been written out.
        self.trainer.storage.iter = self.trainer.iter
        self.trainer.storage.put_scalars(smoothing_hint=False, **report)
        logger.info(
            "Epoch %d: %s",
            self.trainer.epoch + 1,
            ", ".join(f"{name} {value:.4g}" for name, value in report.items()),
        )

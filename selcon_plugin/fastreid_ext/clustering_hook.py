"""``ClusteringHook``: clusters before an epoch, and everything that follows from them."""

from __future__ import annotations

from fastreid.engine.train_loop import HookBase

from selcon_plugin.engine.run import TrainingRun


class ClusteringHook(HookBase):
    """Cluster the training images before every n-th epoch; draw batches from the clusters.

    The method rebuilds its banks, the sampler draws from the new clusters, and the data
    iterator starts over, so that no batch of the old labels follows.

    Args:
        run: The training run.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def before_epoch(self) -> None:
        """Cluster if it is time, then set up the sampler for this epoch."""
        first = self.trainer.epoch * self.trainer.iters_per_epoch
        self._run.refresh_pseudo_labels(
            self.trainer.epoch, first, self.trainer.iter - first
        )
        # The iterator has prefetched batches of the labels before.
        self.trainer.restart_data()

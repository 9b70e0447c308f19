"""``ClusteringHook``: clustering before an epoch, and the update of banks and sampler."""

from __future__ import annotations

from fastreid.engine.train_loop import HookBase

from selcon_plugin.engine.run import TrainingRun


class ClusteringHook(HookBase):
    """Hook that clusters the training images before every n-th epoch.

    The method rebuilds its banks, the sampler samples from the new clusters, and the data
    iterator starts over, so that no batch of the old labels follows.

    Args:
        run: The training run.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def before_epoch(self) -> None:
        """Cluster if it is due, then set up the sampler for this epoch."""
        first = self.trainer.epoch * self.trainer.iters_per_epoch
        self._run.refresh_pseudo_labels(
            self.trainer.epoch, first, self.trainer.iter - first
        )
        # The iterator has prefetched batches of the previous labels.
        self.trainer.restart_data()

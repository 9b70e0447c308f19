"""``ImageSelConEngine``, which replaces torchreid's ``ImageSoftmaxEngine``."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from selcon_plugin.clustering import Labeler
from selcon_plugin.config.keys import sampler_of
from selcon_plugin.engine.batches import build_sampler, check_sampler, fitting_batch_size
from selcon_plugin.engine.best_weights import NEVER, BestWeights
from selcon_plugin.engine.extraction import calibrate_normalization, extract_embeddings
from selcon_plugin.engine.image_list import write_image_list
from selcon_plugin.engine.progress import TrainingProgress, on_terminal
from selcon_plugin.engine.run import TrainingRun, seed_all
from selcon_plugin.engine.step import take_step
from selcon_plugin.engine.stopping import StopSignals
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method, method_class
from selcon_plugin.runs.metrics import LossAverage, append_metrics
from selcon_plugin.runs.results import RunMeter
from selcon_plugin.samplers.cluster import clusters_per_batch
from selcon_plugin.torchreid_ext.checkpoint_engine import CheckpointEngine
from selcon_plugin.torchreid_ext.config import KEYS
from selcon_plugin.torchreid_ext.data import (
    EpochLoader,
    ExtractionLoader,
    IndexedReIDImages,
    training_images,
)
from selcon_plugin.torchreid_ext.layers import stage_rates
from selcon_plugin.torchreid_ext.messages import messages_shown
from selcon_plugin.torchreid_ext.models import fit_to_method, with_head
from selcon_plugin.torchreid_ext.options import EngineOptions

logger = logging.getLogger(__name__)

_DEFAULT_BATCH_SIZE = 32  # torchreid's


class ImageSelConEngine(CheckpointEngine):
    """Engine for label-free training with torchreid's data manager, model and optimizer.

    Constructor and :meth:`run` are used like those of ``ImageSoftmaxEngine``; evaluation,
    ``visrank`` and TensorBoard are torchreid's. Identities of the training set are not
    used.

    Checkpoints are torchreid's files and include banks and labels. To resume from one::

        start_epoch = engine.resume("log/osnet/model/model.pth.tar-20")
        engine.run(save_dir="log/osnet", max_epoch=60, start_epoch=start_epoch)

    torchreid's ``resume_from_checkpoint`` also works for a :class:`SelConModel`, but does
    not detect different settings or images.

    Args:
        datamanager: torchreid's ``ImageDataManager``, with images, transforms, batch size.
        model: :class:`SelConModel`, or any torchreid model, whose classifier our head then
            replaces; the head's weights are added to the optimizer. May be wrapped in
            ``nn.DataParallel``.
        optimizer: Optimizer of the model's parameters.
        scheduler: Learning-rate schedule by epoch, or None.
        method: Registered name; see :func:`selcon_plugin.methods.method_names`.
        clustering: Clustering for methods with clusters: either a labeler, or a dict with
            ``labeler``, its options (``eps`` ...), ``period``, ``features``,
            ``center_cameras``, ``reliability``, ``drop_single_camera``, ``outliers``. None
            for the defaults.
        use_gpu: Whether to use a GPU, as in torchreid.
        num_instances: Images of each cluster in a batch.
        head: Arguments of :class:`SelConModel` for a model without our head.
        new_layers: Layers with the rate of new layers, if the optimizer has staged rates
            and torchreid found none of them; the classifier is the head.
        checkpoint_period: Epochs between checkpoints; 0 for only the last epoch.
        checked: Options that were checked with a config, in place of ``method``,
            ``clustering`` and ``options``.
        config: Complete config of the run, which is written to its folder; None in a script
            without one.
        overwrite: Whether a new run may start in the folder of an earlier one, whose files
            it moves to a folder ``old-<time>`` in it. Otherwise it is refused.
        **options: Options of the method, such as ``temperature``, and of the run:
            ``sampler``, ``outlier_ratio``, ``iters_per_epoch``, ``micro_batches``,
            ``extra_images``, ``max_unreadable_ratio``, ``ema_decay``,
            ``diagnostics_period``, ``keep_checkpoints``, ``keep_best_by``,
            ``on_nonfinite``, ``max_nonfinite_steps``, ``report_images``,
            ``tensorboard_pictures``, ``seed``.

    Attributes:
        start_epoch: Epoch to start with; set by :meth:`resume`.
        results: Metrics of the last evaluation in percent, by test set and name.
        meter: Time and memory of training.

    Raises:
        ValueError: If an option is unknown or invalid, or data and options do not match.
    """

    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        method: str = "SelectiveContrastive",
        clustering: Labeler | Mapping[str, Any] | None = None,
        use_gpu: bool = True,
        *,
        num_instances: int = 4,
        head: Mapping[str, Any] | None = None,
        new_layers: str | Sequence[str] = "classifier",
        checkpoint_period: int = 1,
        checked: EngineOptions | None = None,
        config: CfgNode | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(datamanager, use_gpu, overwrite=overwrite, config=config)
        found = checked or EngineOptions.of_arguments(method, clustering, options)
        self._engine_options, self._options = found, found.run
        self._method_name, self._method_options = found.run.method, found.method
        self._checkpoint_period = checkpoint_period
        self.model, self._network = with_head(
            model, optimizer, scheduler, datamanager, dict(head or {})
        )
        fit_to_method(self._network, self._method_name, found.method, datamanager)
        stage_rates(optimizer, self._network, new_layers)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.register_model("model", self.model, optimizer, scheduler)
        images = training_images(
            datamanager,
            self._options.seed,
            self._options.extra_images,
            self._options.max_unreadable_ratio,
        )
        self._num_instances = num_instances
        criterion = self._options.keep_best_by
        self._best = None
        if criterion != NEVER:
            self._best = BestWeights(criterion, self._save_best)
        self._training = self._build_run(images)
        self.meter = RunMeter()
        self.num_clusters: int | None = None
        self._losses_seen = LossAverage()
        self._signals = StopSignals()
        self._progress: TrainingProgress | None = None
        self._ready = False

    # --- setting up -----------------------------------------------------------------------

    def _build_run(self, images: IndexedReIDImages) -> TrainingRun:
        host_loader, options = self.datamanager.train_loader, self._options
        batch_size, num_instances = host_loader.batch_size, self._num_instances
        readers = {
            "num_workers": host_loader.num_workers,
            "pin_memory": host_loader.pin_memory,
        }
        sampler_name = sampler_of(self._method_name, options.sampler)
        batch_size = fitting_batch_size(
            batch_size,
            _DEFAULT_BATCH_SIZE,
            len(images),
            sampler=sampler_name,
            num_instances=num_instances,
            micro_batches=options.micro_batches,
            key="train.batch_size",
        )
        sampler = build_sampler(
            sampler_name,
            len(images),
            batch_size=batch_size,
            num_instances=num_instances,
            outlier_ratio=options.outlier_ratio,
            micro_batches=options.micro_batches,
            seed=options.seed,
        )
        iters = options.iters_per_epoch or len(images) // batch_size
        self.train_loader = EpochLoader(images, sampler, iters, **readers)
        self._metadata = self._run_state(images, batch_size)
        test_view = images.with_transform(self.datamanager.transform_te)
        test_batch = max(
            [loaders["query"].batch_size for loaders in self.test_loader.values()],
            default=batch_size,
        )
        extraction = ExtractionLoader(test_view, test_batch, **readers)
        # This instance serves only for its checks; training builds the network's own one.
        probe = self._build_method(1)
        probe.check_cameras(images.camera_ids)
        check_sampler(
            sampler_name,
            self._method_name,
            needs_clusters=probe.needs_clusters,
            key="sampler",
        )
        labeler = self._engine_options.labeler if probe.needs_clusters else None
        if labeler is not None:
            labeler.check_counts(len(images), KEYS.clustering_name)
        return TrainingRun(
            self._network,
            images,
            sampler,
            labeler,
            extract=lambda: extract_embeddings(self._network, extraction, len(images)),
            calibrate=lambda: calibrate_normalization(self._network, test_view, test_batch),
            options=options,
            clustering=self._engine_options.clustering,
            min_clusters=clusters_per_batch(sampler_name, batch_size, num_instances),
            best=self._best,
            report=self._report_clusters,
        )

    def _build_method(self, num_images: int) -> Method:
        head = self._network.heads
        return method_class(self._method_name)(
            num_images,
            head.global_dim,
            head.num_parts,
            head.part_dim,
            **self._method_options,
        )

    def _prepare_network(self) -> None:
        """Add the method to the network, and initialize its banks."""
        network, images = self._network, self._training.dataset
        if network.method is None:
            seed_all(self._options.seed)
            network.method = self._build_method(len(images)).to(network.device)
        self._add_teacher()
        write_image_list(self._save_dir, images)
        self._training.before_training()
        self._ready = True

    def _add_teacher(self) -> None:
        """Add the teacher to the network, and load pending state from a checkpoint."""
        if self._network.teacher is None:
            self._network.add_teacher(self._options.ema_decay)
        self._network.load_pending_state()

    # --- training -------------------------------------------------------------------------

    def run(
        self, save_dir: str = "log", max_epoch: int = 0, *args: Any, **kwargs: Any
    ) -> None:
        """Train and evaluate with the arguments of torchreid's ``run``.

        A resumed run that is already complete is evaluated. On SIGTERM or Ctrl-C the run
        ends after the current step, with a checkpoint from which it resumes exactly, and
        raises :class:`~selcon_plugin.engine.stopping.RunStopped`, a ``SystemExit``.

        Args:
            save_dir: Folder of checkpoints and TensorBoard files.
            max_epoch: Total number of epochs.
            *args: As in torchreid.
            **kwargs: As in torchreid; ``start_epoch`` defaults to the result of
                :meth:`resume`.

        Raises:
            ValueError: If an argument is invalid; nothing was trained or written then.
        """  # noqa: DOC502  (raised by the functions called here)
        call = inspect.signature(super().run).bind(save_dir, max_epoch, *args, **kwargs)
        call.arguments.setdefault("start_epoch", self.start_epoch)
        self.check_run(call.arguments)
        self._save_dir = self._training.folder = save_dir
        if call.arguments["start_epoch"] != self.start_epoch:
            # They belong to another epoch.
            self._steps_done, self._unevaluated = 0, False
        with messages_shown():
            if call.arguments.get("test_only"):
                super().run(*call.args, **call.kwargs)
                return
            with self._own_folder(call.arguments):
                self._run_or_test(call, max_epoch)
                self.write_results(save_dir, max_epoch)

    def _run_or_test(self, call: inspect.BoundArguments, max_epoch: int) -> None:
        is_complete = max_epoch <= call.arguments["start_epoch"]
        if self._unevaluated:
            self._prepare_network()
            with self._signals:
                self._evaluate_resumed_epoch(call.arguments)
            if is_complete:
                return
        if is_complete:
            # torchreid would save the end of the run as its first epoch.
            logger.info("The run is complete: nothing to train")
            call.arguments |= {"test_only": True, "rerank": False}
            self._step = max_epoch * len(self.train_loader)
            super().run(*call.args, **call.kwargs)
            return
        with self._signals:
            super().run(*call.args, **call.kwargs)

    def train(
        self, print_freq: int = 10, fixbase_epoch: int = 0, open_layers: Any = None
    ) -> None:
        """Train for one epoch, as torchreid's ``train``.

        Args:
            print_freq: Batches between printed lines.
            fixbase_epoch: Epochs in which only ``open_layers`` are trained.
            open_layers: Names of layers: ``"heads"``, ``"backbone"``, or torchreid's.
        """
        with self.meter.running():
            if not self._ready:
                self._prepare_network()
            first, done = self.epoch * len(self.train_loader), self._steps_done
            self._step, self._steps_done = first + done, 0
            self._stop_if_asked()
            if self._progress is None:
                self._progress = TrainingProgress(
                    self.max_epoch, len(self.train_loader), self._step
                )
            self._training.start_epoch(self.epoch)
            self._training.refresh_pseudo_labels(self.epoch, first, done)
            self.train_loader.steps_done = done
            rate = self.get_current_lr()
            # The bar shows the content of torchreid's lines, which would break it.
            every = sys.maxsize if on_terminal() else print_freq
            with contextlib.closing(self._progress):
                super().train(every, fixbase_epoch, open_layers)
            measured = self._training.end_epoch(self.epoch)
            self._write("Features", measured)
            losses = self._losses_seen.take()
            append_metrics(self._save_dir, self._step - 1, {**losses, "lr": rate})
            if self.epoch + 1 == self.max_epoch:
                self._end_of_training()
        done, period = self.epoch + 1, self._checkpoint_period
        self._epochs_trained, self._unsaved = done, True
        self._unevaluated = self._is_evaluated(done)
        if period and done % period == 0 and done < self.max_epoch:
            self.save_model(self.epoch, 0.0, self._save_dir)

    def _end_of_training(self) -> None:
        self._training.score_final_epoch(self.max_epoch)
        if self._options.tensorboard_pictures:
            self._training.write_pictures(self._save_dir, self._step)

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Train on one batch.

        Args:
            data: A batch of the train loader.

        Returns:
            Losses by name, their sum, and periodically the diagnostics; empty for a skipped
            step.
        """
        # torchreid counts from 0 even if an earlier part of the run started the epoch.
        self.batch_idx = self._step - self.epoch * len(self.train_loader)
        if self._progress is not None:
            self._progress.begin_step(self._step)
        self._training.start_step(self._step)
        losses = take_step(
            self._losses,
            data,
            self.optimizer,
            images_name="img",
            step=self._step,
            model=self.model,
            num_micro_batches=self._options.micro_batches,
            guard=self._training.guard,
            total_name="loss",
        )
        self._training.after_step()
        if self._progress is not None:
            self._progress.end_step(self._step, losses["loss"])
        self._step += 1
        report = {} if self._training.guard.skipped else self._report_step(losses)
        self._stop_if_asked()
        return report

    def _report_step(self, losses: dict[str, float]) -> dict[str, float]:
        self._losses_seen.add(losses)
        period = self._options.diagnostics_period
        due = period and self._step % period == 0
        return {**losses, **self._training.diagnostics()} if due else losses

    def _stop_if_asked(self) -> None:
        self._signals.stop_if_asked(
            self._save_stopped,
            epoch=self.epoch,
            step=self._step,
            steps_per_epoch=len(self.train_loader),
            resume_by="engine.resume(save_dir)",
        )

    def _losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, index = self.parse_data_for_train(batch)
        views = [self.model(view) for view in self._network.views_of(images)]
        embeddings: Embeddings = self.model(images.to(self._network.device))
        return self._network.method_losses(embeddings, index, batch["camid"], views)

    def _report_clusters(self, measured: Mapping[str, float]) -> None:
        if "num_clusters" in measured:
            self.num_clusters = int(measured["num_clusters"])
        self._write("Clusters", measured)

    def _write(self, group: str, measured: Mapping[str, float]) -> None:
        if self.writer is not None:
            for name, value in measured.items():
                self.writer.add_scalar(f"{group}/{name}", value, self.epoch)
        append_metrics(self._save_dir, self._step, measured)

    def _before_evaluation(self) -> None:
        if self._unsaved:  # an evaluation may fail
            self.save_model(self.epoch, 0.0, self._save_dir)
        self._add_teacher()

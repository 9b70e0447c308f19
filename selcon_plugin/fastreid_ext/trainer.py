"""``SelConTrainer``: FastReID's DefaultTrainer on label-free data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.engine.defaults import DefaultTrainer
from fastreid.engine.train_loop import HookBase, TrainerBase
from fastreid.evaluation import ReidEvaluator
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from fastreid.utils import comm
from fastreid.utils.events import EventStorage, EventWriter
from fastreid.utils.logger import setup_logger
from torch import Tensor, nn

from selcon_plugin.clustering import Labeler
from selcon_plugin.config.recording import record_reads
from selcon_plugin.datasets.content import list_hash
from selcon_plugin.engine.batches import check_sampler
from selcon_plugin.engine.best_weights import BEST_FILE, NEVER, BestWeights
from selcon_plugin.engine.extraction import calibrate_normalization
from selcon_plugin.engine.guard import StepGuard
from selcon_plugin.engine.image_list import images_to_resume_with, write_image_list
from selcon_plugin.engine.ranks import check_same_on_all_ranks
from selcon_plugin.engine.run import TrainingRun, seed_all
from selcon_plugin.engine.stopping import StopSignals
from selcon_plugin.fastreid_ext import checkpoint
from selcon_plugin.fastreid_ext import data as selcon_data
from selcon_plugin.fastreid_ext.checkpoint import SelConCheckpointer
from selcon_plugin.fastreid_ext.config import FLOAT16, KEYS, complete_config, sampler_name
from selcon_plugin.fastreid_ext.effects import bound_cosine, report_effects
from selcon_plugin.fastreid_ext.embedding import extract_training_set, unwrap
from selcon_plugin.fastreid_ext.evaluation import evaluator_of, has_own_evaluator
from selcon_plugin.fastreid_ext.hook_order import arrange_hooks
from selcon_plugin.fastreid_ext.hooks import CheckpointHook, EvaluationHook
from selcon_plugin.fastreid_ext.logs import open_log, share_host_log
from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.fastreid_ext.optimizer import build_optimizer
from selcon_plugin.fastreid_ext.own_evaluators import rehearse_evaluation
from selcon_plugin.fastreid_ext.train_step import (
    AccumulatingAMPTrainer,
    AccumulatingTrainer,
    distribute,
)
from selcon_plugin.fastreid_ext.writers import build_writers, write_metrics
from selcon_plugin.features import Embeddings
from selcon_plugin.io.atomic import named_write_error
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.models.finite import check_state
from selcon_plugin.runs.folder import RunFolder
from selcon_plugin.runs.results import RunMeter
from selcon_plugin.runs.settings import flat_settings
from selcon_plugin.runs.state import RunState
from selcon_plugin.samplers.cluster import clusters_per_batch

logger = logging.getLogger(__name__)


class SelConTrainer(DefaultTrainer):
    """Trainer that replaces ``DefaultTrainer`` in a FastReID script.

    Optimizer, schedule, mixed precision, evaluation, writers and checkpoints are
    FastReID's. The differences are the data (label-free, indexed, resumable), the
    checkpointer (banks, atomic files), the hooks of the method, and support for CPU and
    gloo in addition to CUDA and NCCL.

    Args:
        cfg: FastReID config with ``MODEL.META_ARCHITECTURE: SelCon``; missing keys of the
            plugin are added.
        show_progress: Whether to show each epoch's progress: a bar on a terminal, and a
            line in the log.
        overwrite: Whether a new run may start in the folder of an earlier one, whose files
            it moves to a folder ``old-<time>`` in it. Otherwise it is refused.
    """

    def __init__(
        self, cfg: CfgNode, *, show_progress: bool = True, overwrite: bool = False
    ) -> None:
        self._show_progress = show_progress
        self._overwrite = overwrite
        self._build(cfg)

    def _build(
        self, cfg: CfgNode, images: selcon_data.IndexedDataset | None = None
    ) -> None:
        # DefaultTrainer's constructor is not called, because it wraps the model for CUDA
        # only and its checkpointer does not support banks. This method keeps its order.
        TrainerBase.__init__(self)
        if not logging.getLogger("fastreid").isEnabledFor(logging.INFO):
            setup_logger()
        share_host_log()
        cfg = self._checked(cfg)
        if images is None:
            if not has_own_evaluator(type(self), SelConTrainer):
                selcon_data.check_test_sets(cfg)
            loader = self.build_train_loader(cfg)
        else:
            loader = selcon_data.build_train_loader(cfg, images, lower_default=True)
        selcon_data.check_label_free(loader, type(self).__name__)
        check_same_on_all_ranks(self._settings, loader.dataset, OUTPUT_DIR=cfg.OUTPUT_DIR)
        cfg = self.auto_scale_hyperparams(
            selcon_data.with_batch_size(cfg, loader.sampler.batch_size),
            loader.dataset.num_classes,
        )
        # FastReID logs a random seed of its own during setup; this one replaces it.
        logger.info("Seed of this run: MODEL.SELCON.SEED %d", cfg.MODEL.SELCON.SEED)
        seed_all(cfg.MODEL.SELCON.SEED)
        model = self.build_model(cfg)
        self.labeler = self._build_labeler(cfg, model, loader.dataset.camera_ids)
        self.iters_per_epoch = (
            cfg.MODEL.SELCON.ITERS_PER_EPOCH
            or len(loader.dataset) // cfg.SOLVER.IMS_PER_BATCH
        )
        self.meter = RunMeter()
        criterion = cfg.MODEL.SELCON.KEEP_BEST_BY
        self.best = None
        if criterion != NEVER:
            self.best = BestWeights(criterion, lambda *a: self.checkpointer.save_best(*a))
        self.cfg = cfg
        self.training_run = self._build_run(unwrap(model), loader)
        self._trainer = self._build_steps(cfg, model, loader, self.training_run.guard)
        optimizer = self._trainer.optimizer
        self.scheduler = self.build_lr_scheduler(cfg, optimizer, self.iters_per_epoch)
        bound_cosine(self.scheduler)
        self.checkpointer = self._build_checkpointer(cfg, model, optimizer, loader)
        self.start_epoch, self._steps_done = 0, 0  # steps of the epoch to start with
        self._resumed: dict[str, Any] = {}
        self.max_epoch = cfg.SOLVER.MAX_EPOCH
        self.max_iter = self.max_epoch * self.iters_per_epoch
        self.warmup_iters = cfg.SOLVER.WARMUP_ITERS
        self.delay_epochs = cfg.SOLVER.DELAY_EPOCHS
        self.register_hooks(self.build_hooks())
        self._num_own_hooks = len(self._hooks)

    def _checked(self, cfg: CfgNode) -> CfgNode:
        cfg = complete_config(cfg)
        self.check_meta_architecture(cfg)
        if cfg.OUTPUT_DIR and comm.is_main_process():
            check_output_folder("OUTPUT_DIR", cfg.OUTPUT_DIR)
        self._settings = flat_settings(cfg)
        return record_reads(cfg)

    @staticmethod
    def check_meta_architecture(cfg: CfgNode) -> None:
        """Refuse a config of a supervised training.

        Args:
            cfg: Complete config.

        Raises:
            ValueError: If its meta-architecture is not SelCon.
        """
        name = cfg.MODEL.META_ARCHITECTURE
        if not issubclass(META_ARCH_REGISTRY.get(name), SelCon):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {name!r}, which trains on identities: set it "
                "to SelCon to train without identities"
            )

    def _build_steps(
        self,
        cfg: CfgNode,
        model: nn.Module,
        loader: selcon_data.TrainLoader,
        guard: StepGuard,
    ) -> AccumulatingTrainer:
        """Build the trainer of single steps: optimizer, precision and micro-batches."""
        mixed = cfg.SOLVER.AMP.ENABLED
        if cfg.MODEL.DEVICE == "cpu" or mixed:
            # Convolutions in channels-last format are up to a third faster on a CPU, and a
            # GPU's half-precision units use this format.
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer, param_wrapper = self.build_optimizer(cfg, model)
        parts = (distribute(model), loader, optimizer, param_wrapper)
        options = {"num_micro_batches": cfg.MODEL.SELCON.MICRO_BATCHES, "guard": guard}
        if mixed and cfg.SOLVER.AMP.DTYPE == FLOAT16:
            return AccumulatingAMPTrainer(*parts, **options)
        return AccumulatingTrainer(
            *parts, autocast_dtype=torch.bfloat16 if mixed else None, **options
        )

    @staticmethod
    def _build_labeler(cfg: CfgNode, model: nn.Module, camids: Tensor) -> Labeler | None:
        """Build the labeler of a method that clusters; check cameras and sampler."""
        method = unwrap(model).method
        assert method is not None
        method.check_cameras(camids)
        check_sampler(
            sampler_name(cfg),
            cfg.MODEL.SELCON.METHOD,
            needs_clusters=method.needs_clusters,
            key="MODEL.SELCON.SAMPLER",
        )
        node = cfg.MODEL.SELCON
        return KEYS.labeler(node, len(camids)) if method.needs_clusters else None

    def _build_checkpointer(
        self,
        cfg: CfgNode,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: selcon_data.TrainLoader,
    ) -> SelConCheckpointer:
        extra: dict[str, Any] = dict(self.scheduler)
        extra["meter"] = self.meter
        extra["run"] = RunState(
            self._settings,
            num_images=len(loader.dataset),
            image_list=loader.dataset.fingerprint,
            image_content=list_hash(loader.dataset.hashes),
            seed=cfg.MODEL.SELCON.SEED,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            method=cfg.MODEL.SELCON.METHOD,
        )
        grad_scaler = getattr(self._trainer, "grad_scaler", None)
        if grad_scaler is not None:
            extra["grad_scaler"] = grad_scaler
        if self.labeler is not None:  # the state of its filters
            extra["labeler"] = self.labeler
        if self.best is not None:
            extra["best_without_labels"] = self.best
        checkpointer = SelConCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            optimizer=optimizer,
            **extra,
        )
        checkpointer.folder = RunFolder(cfg.OUTPUT_DIR, overwrite=self._overwrite)
        return checkpointer

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint, or load ``MODEL.WEIGHTS``, as in FastReID.

        Args:
            resume: Whether to resume from the last checkpoint in ``OUTPUT_DIR``.

        Raises:
            FloatingPointError: If the loaded state contains NaN or infinity.
        """  # noqa: DOC502  (raised by the functions called here)
        resuming = resume and self.checkpointer.has_checkpoint()
        if resuming:
            present = self.data_loader.dataset
            images = images_to_resume_with(self.cfg.OUTPUT_DIR, present)
            if images is not present:
                self._rebuild(images)
        elif resume:
            self.checkpointer.folder.resume_from_start()
        loaded = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resuming:
            self.start_epoch = loaded["epoch"] + 1
            self._steps_done = loaded.get("steps_done", 0)
            rest = ("epoch", "metric", checkpoint.UNEVALUATED)
            self._resumed = {key: loaded[key] for key in rest if key in loaded}
            self._restore_frozen_steps()
            if self.best is not None:
                self.best.restore_from(Path(self.cfg.OUTPUT_DIR, BEST_FILE))
        network, images = unwrap(self.model), self.data_loader.dataset
        check_state(network, images.paths, when="after loading")
        # The batches after the checkpoint come next; the loader has not started yet.
        self.data_loader.sampler.start = self._first_step

    def _restore_frozen_steps(self) -> None:
        """Restore the number of frozen steps where a checkpoint does not contain it."""
        if getattr(self.optimizer, "frozen_steps", 0) is None:
            self.optimizer.frozen_steps = self._first_step

    def _rebuild(self, images: selcon_data.IndexedDataset) -> None:
        """Rebuild the trainer with the images that the run started with.

        FastReID's scripts build the trainer before they choose whether to resume. At that
        point banks, batches and steps per epoch are those of the images that exist now.
        Hooks that a script has registered in between are kept.
        """
        registered = self._hooks[self._num_own_hooks :]
        self._build(self.cfg, images)
        self.register_hooks(registered)

    @property
    def _first_step(self) -> int:
        first: int = self.start_epoch * self.iters_per_epoch + self._steps_done
        return first

    def restart_data(self) -> None:
        """Restart the data iterator at the current position of the sampler."""
        self._trainer._data_loader_iter = iter(self.data_loader)

    def _extract(self) -> Embeddings:
        """Compute the features of the training images in the precision of the steps."""
        with self._trainer.autocast():
            return extract_training_set(
                self.cfg, unwrap(self.model), self.data_loader.dataset
            )

    def _build_run(self, model: SelCon, loader: selcon_data.TrainLoader) -> TrainingRun:
        cfg, dataset = self.cfg, loader.dataset
        test_view = selcon_data.build_extraction_loader(cfg, dataset).dataset
        return TrainingRun(
            model,
            dataset,
            loader.sampler,
            self.labeler,
            extract=self._extract,
            calibrate=lambda: calibrate_normalization(
                model, test_view, cfg.TEST.IMS_PER_BATCH
            ),
            options=KEYS.run(cfg.MODEL.SELCON),
            clustering=KEYS.clustering(cfg.MODEL.SELCON),
            min_clusters=clusters_per_batch(
                sampler_name(cfg), cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
            ),
            best=self.best,
            folder=cfg.OUTPUT_DIR,
            report=self._report_clusters,
        )

    def _report_clusters(self, measured: Mapping[str, float]) -> None:
        # The storage is still at the last step, which has been written already.
        self.storage.iter = self.iter
        self.storage.put_scalars(smoothing_hint=False, **measured)

    def build_hooks(self) -> list[HookBase]:
        """Add the method's hooks to FastReID's, and return them in their order."""
        if has_own_evaluator(type(self), SelConTrainer):
            rehearse_evaluation(self, SelConTrainer)
        return arrange_hooks(self, super().build_hooks(), show_progress=self._show_progress)

    def build_writers(self) -> list[EventWriter]:
        """Build FastReID's writers; their files are opened when the run has begun."""
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> Any:
        """Train from the current epoch to ``MAX_EPOCH``.

        On SIGTERM or Ctrl-C the training ends after the current step, with a checkpoint
        from which it resumes exactly.

        Returns:
            Results of the last evaluation on the main process; empty without one.

        Raises:
            RunStopped: If a signal stopped the training; it is a ``SystemExit``.
        """  # noqa: DOC502  (raised by the functions called here)
        self._last_eval_results: dict[str, Any] = {}
        folder = self.checkpointer.folder
        with folder.running(resumed=bool(self._resumed), config=self.cfg.dump()):
            open_log(self.cfg.OUTPUT_DIR)
            if self.start_epoch >= self.max_epoch:
                return self._finish_complete_run()
            write_image_list(self.cfg.OUTPUT_DIR, self.data_loader.dataset)
            return self._train()

    def _train(self) -> Any:
        report_effects(self)
        logger.info("Starting training from epoch %d", self.start_epoch)
        self.iter = self.start_iter = self._first_step
        with StopSignals() as self._signals, EventStorage(self.iter) as self.storage:
            try:
                self.before_train()
                if self._resumed.get(checkpoint.UNEVALUATED):
                    self._evaluate_resumed_epoch()
                self._train_epochs()
            except OSError as error:
                raise named_write_error(error, self.cfg.OUTPUT_DIR) from error
            except (ValueError, FloatingPointError):
                raise  # a person's mistake, which needs no traceback
            except Exception:
                logger.exception("Exception during training:")
                raise
            finally:
                # Its workers end now, because they are hard to reach after it is collected.
                self._trainer._data_loader_iter.close()
                self.after_train()
        return self._last_eval_results if comm.is_main_process() else None

    def _finish_complete_run(self) -> Any:
        """Evaluate a run that has done all of its epochs; write the files it lacks."""
        logger.info("The run in %s is complete: nothing to resume", self.cfg.OUTPUT_DIR)
        if self._resumed.get(checkpoint.UNEVALUATED):
            with EventStorage(self._first_step) as self.storage:
                self._evaluate_resumed_epoch()
            return self._last_eval_results if comm.is_main_process() else None
        if not self.checkpointer.holds_final(self.max_epoch):
            # The best one was resumed; the run was killed before the final one, or that
            # one is damaged.
            self.checkpointer.save(checkpoint.FINAL, **self._resumed)
        return self.test(self.cfg, self.model)

    def _evaluate_resumed_epoch(self) -> None:
        """Evaluate the epoch whose evaluation failed, or was killed, after it was saved."""
        self.epoch = self.start_epoch - 1
        self.iter = self.storage.iter = self._first_step - 1
        for hook in self._hooks:
            if isinstance(hook, CheckpointHook):
                hook.before_train()
            if isinstance(hook, EvaluationHook | CheckpointHook):
                hook.after_epoch()
        self.iter = self.storage.iter = self._first_step

    def _train_epochs(self) -> None:
        """Run FastReID's loop; it starts inside an epoch if the run was stopped there."""
        for epoch in range(self.start_epoch, self.max_epoch):
            self.epoch = epoch
            self._stop_if_asked()
            self.before_epoch()
            while self.iter < (epoch + 1) * self.iters_per_epoch:
                self.before_step()
                self.run_step()
                self.after_step()
                self.iter += 1
                self._stop_if_asked()
            self.after_epoch()

    def _stop_if_asked(self) -> None:
        self._signals.stop_if_asked(
            self._save_stopped,
            epoch=self.epoch,
            step=self.iter,
            steps_per_epoch=self.iters_per_epoch,
            resume_by="resume_or_load(resume=True)",
        )

    def save_before_evaluation(self) -> None:
        """Save the epoch that an evaluation follows, which may fail or be killed.

        An epoch before the last one is saved as a stopped run: a run that resumes from it
        evaluates it. The last one gets its final name.
        """
        write_metrics(self._hooks)
        last = self.epoch + 1 == self.max_epoch
        name = checkpoint.FINAL if last else checkpoint.STOPPED
        self.checkpointer.save(name, epoch=self.epoch, **{checkpoint.UNEVALUATED: True})

    def _save_stopped(self, steps_done: int) -> None:
        if self.iter > self.start_iter:  # there are metrics
            write_metrics(self._hooks, everywhere=True)
        done = {"epoch": self.epoch - 1, "steps_done": steps_done}
        self.checkpointer.save(checkpoint.STOPPED, **done)

    def before_train(self) -> None:
        """Call the hooks before the training."""
        self._hooks_started = False
        super().before_train()
        self._hooks_started = True

    def after_train(self) -> None:
        """Call the hooks after the training, unless one failed before it.

        In that case FastReID's own hooks would raise another error and hide the cause.
        """
        if self._hooks_started:
            super().after_train()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> selcon_data.TrainLoader:
        """Build the label-free train loader."""
        return selcon_data.build_train_loader(cfg, lower_default=True)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> tuple[Any, Any]:
        """Build FastReID's optimizer on the model's own parameters.

        Args:
            cfg: Complete config.
            model: Model whose parameters are trained.

        Returns:
            The optimizer, and its parameter groups as FastReID's trainer expects them.
        """
        return build_optimizer(cfg, model)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> tuple[Any, int]:
        """Build FastReID's test loader."""
        return selcon_data.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> tuple[Any, ReidEvaluator]:
        """Build FastReID's evaluator, with the camera term if the config enables it."""
        loader, num_query = cls.build_test_loader(cfg, dataset_name)
        return evaluator_of(cfg, dataset_name, loader, num_query, output_dir)

    @staticmethod
    def auto_scale_hyperparams(cfg: CfgNode, num_classes: int) -> CfgNode:
        """Set the number of classes to one per image, regardless of the config."""
        cfg = cfg.clone()
        frozen = cfg.is_frozen()
        cfg.defrost()
        # FastReID's own method also writes config.yaml, before anything else is checked.
        cfg.MODEL.HEADS.NUM_CLASSES = num_classes
        if frozen:
            cfg.freeze()
        return cfg

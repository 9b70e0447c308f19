"""torchreid's arguments of a run: checked early, and read as its scripts mean them."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from typing import Any

from selcon_plugin.runs.results import RunMeter, write_results
from selcon_plugin.torchreid_ext.data import EpochLoader
from selcon_plugin.torchreid_ext.datasets import plain_name
from selcon_plugin.torchreid_ext.evaluation import EvaluationEngine
from selcon_plugin.torchreid_ext.layers import find_layers, open_only
from selcon_plugin.torchreid_ext.models import SelConModel
from selcon_plugin.torchreid_ext.options import EngineOptions
from selcon_plugin.torchreid_ext.run_arguments import (
    check_run_arguments,
    check_run_values,
    check_start,
)
from selcon_plugin.torchreid_ext.script_config import NOTICE, config_of_script

logger = logging.getLogger(__name__)


class ScriptEngine(EvaluationEngine):
    """Engine that torchreid's scripts can run with the arguments of their configs.

    Args:
        datamanager: Data manager of torchreid.
        use_gpu: Whether to use a GPU, as in torchreid.
    """

    _network: SelConModel
    _engine_options: EngineOptions
    _num_instances: int
    train_loader: EpochLoader
    meter: RunMeter
    num_clusters: int | None

    def __init__(self, datamanager: Any, use_gpu: bool) -> None:
        super().__init__(datamanager, use_gpu)
        self.start_epoch = 0
        self._epochs_trained = 0
        self._checked: dict[str, Any] = {}  # arguments of the last check
        self._steps_done = 0  # steps done of the epoch to start with
        self._unsaved = False  # whether the weights changed since the last checkpoint

    def check_run(
        self, arguments: Mapping[str, Any], *, keys: Mapping[str, str] | None = None
    ) -> None:
        """Refuse arguments of a run before it changes anything.

        Args:
            arguments: Arguments of :meth:`run` by name.
            keys: Names to use in error messages, such as config keys.

        Raises:
            ValueError: If an argument is invalid; the message names it.
        """  # noqa: DOC502  (raised by the functions called here)
        given = {name: value for name, value in arguments.items() if name != "save_dir"}
        if given == self._checked:
            return  # the caller of run() has checked them
        self._checked = given
        if keys is None:  # a config was checked before
            check_run_values(arguments)
        check_run_arguments(arguments, keys=keys)
        self.check_test_arguments(arguments)
        if arguments.get("test_only"):
            return
        start_epoch = arguments.get("start_epoch", self.start_epoch)
        trained: int | None = self._epochs_trained
        if not trained and self._network.holds_run:
            trained = None  # torchreid's resume_from_checkpoint does not tell the engine
        check_start(start_epoch, arguments["max_epoch"], trained)
        layers = arguments.get("open_layers")
        if arguments.get("fixbase_epoch") and layers is not None:
            find_layers(
                self._network, layers, key=(keys or {}).get("open_layers", "open_layers")
            )

    def _is_evaluated(self, epochs: int) -> bool:
        """Return whether torchreid's ``run`` evaluates after so many epochs."""
        given = self._checked
        period = given.get("eval_freq", -1)
        due = period > 0 and epochs >= given.get("start_eval", 0) and not epochs % period
        return bool(self.test_loader) and (due or epochs == self.max_epoch)

    def _evaluate_resumed_epoch(self, arguments: Mapping[str, Any]) -> None:
        """Evaluate the epoch whose evaluation was killed after it was saved.

        Args:
            arguments: Arguments of :meth:`run` by name.
        """
        self.epoch = self.start_epoch - 1
        self._step = self.start_epoch * len(self.train_loader)
        # What torchreid's run passes on.
        names = set(inspect.signature(super().test).parameters) - {"rerank"}
        rank1 = self.test(**{name: arguments[name] for name in names & arguments.keys()})
        self.save_model(self.epoch, rank1, arguments["save_dir"])

    def two_stepped_transfer_learning(
        self, epoch: int, fixbase_epoch: int, open_layers: Any, model: Any = None
    ) -> None:
        """Freeze all but the open layers in the first epochs, as torchreid does.

        Args:
            epoch: Index of the epoch, from 0.
            fixbase_epoch: Epochs with frozen layers.
            open_layers: Names of the layers to train, as for :func:`find_layers`; None
                freezes nothing.
            model: As in torchreid.
        """
        if epoch >= fixbase_epoch or open_layers is None:
            super().two_stepped_transfer_learning(epoch, 0, None, model)
            return
        logger.info(
            "Only %s is trained (epoch %d of %d)", open_layers, epoch + 1, fixbase_epoch
        )
        open_only(self._network, find_layers(self._network, open_layers))

    def script_config(self, arguments: Mapping[str, Any]) -> str:
        """Return the config of a script's run, as text for ``config.yaml``.

        Args:
            arguments: Arguments of :meth:`run` by name.

        Returns:
            The text; empty if torchreid cannot build the model by a name.
        """
        cfg = config_of_script(
            self._network,
            self.datamanager,
            self._engine_options,
            arguments,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            num_instances=self._num_instances,
        )
        if cfg is None:
            logger.warning(
                "No config.yaml is written, because torchreid's factory has no name for "
                "the model: selcon extract, export and search need --config-file"
            )
            return ""
        return f"{NOTICE}{cfg.dump()}"

    def write_results(self, folder: str, epochs: int) -> None:
        """Write ``results.json`` of a finished run.

        Args:
            folder: Folder of the run.
            epochs: Total number of epochs.
        """
        write_results(
            folder,
            method=self._engine_options.run.method,
            seed=self._engine_options.run.seed,
            num_images=len(self.train_loader.dataset),
            epochs=epochs,
            steps=epochs * len(self.train_loader),
            metrics={plain_name(name): found for name, found in self.results.items()},
            meter=self.meter,
            num_clusters=self.num_clusters,
            device=self._network.device,
            host="torchreid",
        )

    def update_lr(self, names: Any = None) -> None:
        """Advance the schedule by an epoch, as torchreid's ``update_lr``.

        Args:
            names: As in torchreid.
        """
        with warnings.catch_warnings():
            # An earlier part of the run may have taken all steps of the epoch.
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler")
            super().update_lr(names)

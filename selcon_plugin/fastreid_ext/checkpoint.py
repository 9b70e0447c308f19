"""Atomic checkpoints that resume only the run to which they belong."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastreid.utils.checkpoint import Checkpointer

from selcon_plugin.config.checks import check_network_file
from selcon_plugin.engine.best_weights import BEST_FILE
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.fastreid_ext.supervised import to_own_head
from selcon_plugin.io.atomic import save_atomically, write_atomically
from selcon_plugin.io.safe_loading import MIN_LOADED_RATIO
from selcon_plugin.io.tensor_names import unwrapped_state
from selcon_plugin.models.architecture import RECORD, recorded_architecture
from selcon_plugin.models.finite import name_some
from selcon_plugin.models.state_keys import (
    TEACHER_PREFIX,
    is_method_state,
    is_network_weight,
    without_method,
)
from selcon_plugin.runs.checkpoints import (
    BadCheckpointError,
    first_readable,
    newest_first,
    read_checkpoint,
)
from selcon_plugin.runs.folder import RunFolder, written_settings

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"
# Checkpoint inside an epoch, written when a signal stops the run.
STOPPED = "model_stopped"
# Checkpoint of the epoch with the best metric; it is not the last one.
BEST = "model_best"
# Checkpoint of the last epoch.
FINAL = "model_final"
# Entry of a checkpoint that was saved before the evaluation of its epoch.
UNEVALUATED = "unevaluated"
# What a training may choose otherwise than that of its initial weights.
_MAY_CHANGE = (
    "input_size",
    "parts",
    "global_dim",
    "projection",
    "neck",
    "global_weight",
)
_REQUIRED = ("model", "optimizer", "run", "epoch")


class SelConCheckpointer(Checkpointer):
    """FastReID's checkpointer, with three differences.

    A file appears under its name only when it is complete. If the last checkpoint is
    unreadable, the one before is used. Banks are loaded only when a run resumes: as
    ``MODEL.WEIGHTS`` a checkpoint provides only its network, because its banks belong to
    the images of its own training.
    """

    _file = ""
    # Set by the trainer.
    folder = RunFolder("")

    @property
    def initializes(self) -> bool:
        """Return whether a training starts from the weights, possibly with another head."""
        return "optimizer" in self.checkpointables

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint; a kill at any time leaves the previous one intact."""
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict(), **self._record()}
        for key, obj in self.checkpointables.items():
            data[key] = obj.state_dict()
        data.update(kwargs)
        file = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", file)
        save_atomically(data, file)
        if name != BEST:
            self.tag_last_checkpoint(os.path.basename(file))
        if name not in (STOPPED, BEST):  # the stopped checkpoint is outdated
            Path(self.save_dir, f"{STOPPED}.pth").unlink(missing_ok=True)

    def save_best(self, epochs: int, best: Mapping[str, Any]) -> None:
        """Write only the weights, as the best by a label-free criterion.

        No run can resume from this file.

        Args:
            epochs: Number of epochs that the weights were trained for.
            best: The value that makes them the best.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        weights = without_method(self.model.state_dict())
        save_atomically(
            {"model": weights, "epochs": epochs, "best": dict(best), **self._record()},
            Path(self.save_dir, BEST_FILE),
        )

    def _record(self) -> dict[str, Any]:
        own = isinstance(self.model, EmbeddingNetwork)
        return {RECORD: self.model.architecture()} if own else {}

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the name of the last checkpoint atomically."""
        write_atomically(last_filename_basename, os.path.join(self.save_dir, _TAG))
        # FastReID's own record has no checksum.
        self.folder.mark_last(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from, readable or not."""
        return bool(self.save_dir and self.folder.has_begun and self._candidates())

    def _candidates(self) -> list[Path]:
        """List the checkpoints of the run, the last one first."""
        last = self.folder.last
        if not Path(self.save_dir, last or "none").is_file():  # or an earlier version
            with contextlib.suppress(OSError):
                named = Path(self.save_dir, _TAG)
                last = named.read_text(encoding="utf-8", errors="replace").strip()
        return newest_first(list(Path(self.save_dir).glob("model_*.pth")), last)

    @property
    def best_metric(self) -> float | None:
        """Return the metric in the file of the best model; None if there is none.

        A kill may fall between the writing of that file and of the epoch's checkpoint: then
        the file has a better metric than the checkpoint.
        """
        try:
            content = read_checkpoint(Path(self.save_dir, f"{BEST}.pth"), ["metric"])
        except FileNotFoundError:
            return None
        except BadCheckpointError as error:
            self.logger.warning("%s: the best model may be written again", error)
            return None
        return float(content["metric"])

    def holds_final(self, epochs: int) -> bool:
        """Return whether the final checkpoint is readable and of so many epochs.

        Args:
            epochs: Number of epochs that it must have been trained for, or more.
        """
        try:
            content = read_checkpoint(Path(self.save_dir, f"{FINAL}.pth"), _REQUIRED)
        except (FileNotFoundError, BadCheckpointError):
            return False
        return int(content["epoch"]) + 1 >= epochs

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint, or load network weights from ``path``.

        Args:
            path: File with network weights for a new run; may be empty.
            resume: Whether to resume from the last checkpoint of this folder, if there is
                one.

        Returns:
            Entries of the checkpoint other than the restored objects.

        Raises:
            FileNotFoundError: If ``path`` does not exist.
            ValueError: If it is a folder.
        """  # noqa: DOC502  (raised by the functions called here)
        if resume and self.has_checkpoint():
            return self._resume()
        if path:
            check_network_file("MODEL.WEIGHTS", path)
        loaded: dict[str, Any] = self.load(path, checkpointables=[])
        return loaded

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint as FastReID does, and keep its path for error messages.

        Args:
            path: Path of the checkpoint.
            checkpointables: Objects to restore in addition to the weights; None for all.

        Returns:
            Entries of the checkpoint other than the restored objects.
        """
        self._file = path
        loaded: dict[str, Any] = super().load(path, checkpointables)
        return loaded

    def _resume(self) -> dict[str, Any]:
        file, checkpoint = first_readable(self._candidates(), _REQUIRED)
        self.logger.info("Resuming from %s", file)
        # This check precedes the weights: those of another run would fail on their shapes,
        # without a clear reason.
        then = {"settings": written_settings(self.save_dir), **checkpoint.pop("run")}
        try:
            self.checkpointables["run"].load_state_dict(then)
        except ValueError:
            if self.save_to_disk:
                self.folder.restore_config()
            raise
        # FastReID skips tensors of another shape with a warning, but a cluster memory has
        # as many rows as there were clusters. In addition, no entry may be missing here.
        if isinstance(self.model, SelCon):
            recorded = recorded_architecture(checkpoint, checkpoint["model"])
            self.model.check_record(recorded, str(file))
        self.model.load_state_dict(checkpoint.pop("model"))
        for key, checkpointable in self.checkpointables.items():
            if key in checkpoint:
                checkpointable.load_state_dict(checkpoint.pop(key))
        return checkpoint

    def _load_file(self, f: str) -> dict[str, Any]:
        return read_checkpoint(f, ["model"])

    def _load_model(self, checkpoint: Any) -> Any:
        weights = checkpoint["model"]
        if not isinstance(weights, dict):
            raise ValueError(
                f"{self._file} contains no weights: expected tensors by name under 'model'"
            )
        state = unwrapped_state(without_method(weights))
        has_teacher = any(name.startswith(TEACHER_PREFIX) for name in state)
        if isinstance(self.model, SelCon):
            recorded = recorded_architecture(checkpoint, weights)
            ignore = _MAY_CHANGE if self.initializes else ()
            self.model.check_record(recorded, self._file, ignore=ignore)
            state = self._complete(to_own_head(state, self.model.heads))
        checkpoint["model"] = state
        incompatible = super()._load_model(checkpoint)
        if not has_teacher and isinstance(self.model, SelCon):
            self.model.update_teacher(restart=True)
        return incompatible

    def _complete(self, state: dict[str, Any]) -> dict[str, Any]:
        """Refuse weights of another model, and name what an initialization lacks.

        FastReID loads what fits and leaves the rest as it was initialized.

        Returns:
            Weights for all of the network, and for nothing else.

        Raises:
            ValueError: If less than half of the network is in them, or without
                ``initializes`` less than all.
        """
        own = {k: v for k, v in self.model.state_dict().items() if is_network_weight(k)}
        lacking = [
            k for k, v in own.items() if getattr(state.get(k), "shape", 0) != v.shape
        ]
        left = [k for k in state if is_network_weight(k) and k not in own]
        found = len(own) - len(lacking)
        if found < MIN_LOADED_RATIO * len(own):
            raise ValueError(
                f"the weights from {self._file} do not fit: only {found} of the network's "
                f"{len(own)} tensors have an entry of the same name and shape. Use the "
                "config of their training, or other weights"
            )
        for names, what in (
            (lacking, "of the network are not in them, or of another shape"),
            (left, "of them have no place in the network"),
        ):
            if not names:
                continue
            message = f"{len(names)} tensors {what}: {name_some(names)}"
            if not self.initializes:
                raise ValueError(
                    f"the weights from {self._file} are of another network: {message}. Use "
                    "the config of their training, or other weights"
                )
            logger.warning("%s: %s", self._file, message)
        kept = {name: own[name] for name in lacking}
        return {name: state[name] for name in state if name not in left} | kept

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        # The banks of a new run are filled from its own images.
        incompatible = incompatible._replace(
            missing_keys=[
                key for key in incompatible.missing_keys if not is_method_state(key)
            ]
        )
        super()._log_incompatible_keys(incompatible)

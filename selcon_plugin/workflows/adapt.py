"""Adapt a trained network to a folder of images, and keep what became better.

The network trains on the images without labels. Before, and at each checkpoint, its
features of the same images are measured by
:func:`~selcon_plugin.metrics.label_free.label_free_quality`; the best of all is the result,
the given network among them: by that score it never ends worse than it began.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selcon_plugin.config.checks import make_output_folder
from selcon_plugin.datasets import read_image_folder
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.metrics.label_free import LabelFreeQuality, label_free_quality
from selcon_plugin.workflows.adapt_hosts import AdaptHost, find_host
from selcon_plugin.workflows.cluster_folder import fingerprint
from selcon_plugin.workflows.folder_clusters import default_options

__all__ = ["AdaptSettings", "Adapted", "Candidate", "adapt"]

logger = logging.getLogger(__name__)

ADAPTED_FILE, CONFIG_FILE, RECORD_FILE = "adapted.pth", "config.yaml", "adapt.json"
TRAINING_FOLDER = "training"
# Each takes as long to measure as a clustering of the training does.
_CHECKPOINTS = 5


@dataclass(frozen=True)
class AdaptSettings:
    """What to adapt, and how.

    Attributes:
        weights: Checkpoint of this plugin, FastReID or torchreid, or plain weights.
        images: Folder of images.
        config_file: Config of the checkpoint; empty for the ``config.yaml`` beside it.
        backbone: For weights without a config, torchreid's name of the model.
        method: Registered name of the method that trains; empty for that of the config, if
            it names one, else SelConCluster.
        epochs: Epochs to train, at least 1.
        learning_rate: Of Adam, which trains.
        camera_pattern: How to find the camera in a file's path, as for ``selcon train``.
        batch_size: Images of a training step, and of those computed together.
        num_workers: Processes that read images.
        device: ``"auto"`` for a GPU if there is one, or as in PyTorch.
        options: ``KEY VALUE`` pairs of the host's config; they come last.
    """

    weights: str
    images: str
    config_file: str = ""
    backbone: str = ""
    method: str = ""
    epochs: int = 10
    learning_rate: float = 3.5e-4
    camera_pattern: str = ""
    batch_size: int = 64
    num_workers: int = 0
    device: str = "auto"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be a whole number >= {least}, got {getattr(self, name)}"
                )
        if not (0 < self.learning_rate < math.inf):
            raise ValueError(
                f"learning_rate must be a number > 0, got {self.learning_rate}"
            )

    @property
    def checkpoint_period(self) -> int:
        """Epochs between the checkpoints that are measured: five at most."""
        return math.ceil(self.epochs / _CHECKPOINTS)


@dataclass(frozen=True)
class Candidate:
    """A network that was measured.

    Attributes:
        epochs: Epochs of adaptation; 0 for the given network.
        file: Its checkpoint.
        quality: Of its features; None where they hold NaN or infinity.
    """

    epochs: int
    file: str
    quality: LabelFreeQuality | None

    @property
    def value(self) -> float:
        """The figure that decides."""
        return -1.0 if self.quality is None else self.quality.value


@dataclass(frozen=True)
class Adapted:
    """What an adaptation came to.

    Attributes:
        file: The network.
        before: The given one.
        best: The one in ``file``.
        candidates: All that were measured, the given one first.
    """

    file: Path
    before: Candidate
    best: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def improved(self) -> bool:
        """Whether it is another network than the given one."""
        return self.best.epochs > 0


def adapt(
    settings: AdaptSettings,
    output: str | Path,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Adapted:
    """Adapt a network to a folder of images.

    Writes ``adapted.pth``, ``config.yaml``, with which it is loaded, and ``adapt.json``,
    what was measured. The same call after a kill goes on where it was.

    Args:
        settings: What to adapt, and how.
        output: Folder to write to.
        say: Takes lines for the user.

    Returns:
        The network and what was measured.

    Raises:
        ValueError: If a setting is illegal, or the folder holds another adaptation.
        FileNotFoundError: If there is no such file or folder.
        RunStopped: If it was stopped by a signal; a ``SystemExit``.
    """  # noqa: DOC502  (raised by what this calls)
    if not Path(settings.weights).expanduser().is_file():
        raise FileNotFoundError(f"--weights {settings.weights!r} does not exist")
    make_output_folder("--output", str(output))
    output = Path(output)
    items = read_image_folder(settings.images, camera_pattern=settings.camera_pattern)
    host = find_host(settings.weights, settings.config_file, settings.backbone)
    given_config = host.load_config(settings.options)
    record = _Record.open(output / RECORD_FILE, settings, fingerprint(items))
    if record.done:
        say(f"{output} holds this adaptation, complete: nothing to do")
        return record.result(output)
    measure = _Measure(settings, record, say)
    measure(0, settings.weights, given_config)
    training = output / TRAINING_FOLDER
    cfg = host.training_config(
        images=settings.images,
        camera_pattern=settings.camera_pattern,
        settings=_run_settings(settings, len(items), training),
        options=settings.options,
    )
    _train(host, cfg, say)
    for epochs, file in host.checkpoints(training, settings.epochs):
        measure(epochs, file, cfg)
    _write_best(host, record, output, {0: given_config}, cfg)
    result = record.finish(output)
    _say_result(result, say)
    return result


def _run_settings(settings: AdaptSettings, num_images: int, folder: Path) -> dict[str, Any]:
    """Name what is set in the config of either host."""
    return {
        "weights": str(Path(settings.weights).expanduser()),
        "method": settings.method,
        "epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "checkpoint_period": settings.checkpoint_period,
        "device": settings.device,
        "folder": str(folder),
        "clustering": {**default_options("DBSCAN", num_images), "center_cameras": True},
    }


def _train(host: AdaptHost, cfg: Any, say: Callable[[str], None]) -> None:
    try:
        host.train(cfg)
    except FloatingPointError as error:
        say(f"Training ended early: {error}")


class _Measure:
    """Measures a network, unless the record has it already."""

    def __init__(
        self, settings: AdaptSettings, record: _Record, say: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._record = record
        self._say = say
        self._paths: tuple[str, ...] | None = None

    def __call__(self, epochs: int, file: str | Path, cfg: Any) -> None:
        """Measure a checkpoint and note what came out.

        Args:
            epochs: Epochs of adaptation.
            file: The checkpoint.
            cfg: Its config.
        """
        known = {candidate.epochs: candidate for candidate in self._record.candidates}
        if epochs in known:
            return
        try:
            features = self._features(file, cfg)
            finite = bool(np.isfinite(features.features).all())
        except FloatingPointError:  # in the weights
            finite = False
        quality = label_free_quality(features.features) if finite else None
        place = str(Path(file).expanduser().absolute())  # a later call may be elsewhere
        self._record.add(Candidate(epochs, place, quality))
        name = f"after {epochs} epochs" if epochs else "as given"
        self._say(f"{name}: {_summary(quality)}")

    def _features(self, file: str | Path, cfg: Any) -> FolderFeatures:
        found = self._embedder(file, cfg).embed_folder(
            self._settings.images,
            camera_pattern="none",
            batch_size=self._settings.batch_size,
            num_workers=self._settings.num_workers,
            show_progress=sys.stderr.isatty(),
        )
        if self._paths not in (None, found.paths):
            raise ValueError(
                f"the images in {self._settings.images} changed while they were measured: "
                "leave the folder alone, and begin anew with another --output"
            )
        self._paths = found.paths
        return found

    def _embedder(self, file: str | Path, cfg: Any) -> Embedder:
        # Through a file: an embedder is made from what a run leaves.
        config_file = self._record.folder / TRAINING_FOLDER / f"measured_{CONFIG_FILE}"
        config_file.parent.mkdir(exist_ok=True)
        write_atomically(cfg.dump(), config_file)
        return Embedder.from_checkpoint(
            file, config_file=config_file, device=self._settings.device
        )


def _summary(quality: LabelFreeQuality | None) -> str:
    if quality is None:
        return "NaN or infinity, left out"
    if quality.collapse:
        return f"quality 0: collapsed, {quality.collapse}"
    return (
        f"quality {quality.value:.4f} (silhouette {quality.silhouette:.3f}, coverage "
        f"{quality.coverage:.3f}, stability {quality.stability:.3f}; "
        f"{quality.num_clusters} clusters, {100 * quality.outlier_ratio:.0f} % outliers)"
    )


def _say_result(result: Adapted, say: Callable[[str], None]) -> None:
    before, best = result.before.value, result.best.value
    if result.improved:
        say(
            f"The network after {result.best.epochs} epochs is the best, quality "
            f"{before:.4f} -> {best:.4f}: {result.file}"
        )
    else:
        say(
            f"No epoch is better than the given network, quality {before:.4f}: it is kept "
            f"as {result.file}. Try a smaller learning rate, or other settings"
        )


def _write_best(
    host: AdaptHost,
    record: _Record,
    output: Path,
    given: Mapping[int, Any],
    trained_config: Any,
) -> None:
    best = record.best
    if best.epochs == 0 and best.quality is None:
        raise ValueError("the given network's features hold NaN or infinity")
    host.write_network(best.file, output / ADAPTED_FILE, trained=best.epochs > 0)
    cfg = given.get(best.epochs, trained_config)
    write_atomically(cfg.dump(), output / CONFIG_FILE)


@dataclass
class _Record:
    """``adapt.json``: settings, and what was measured so far."""

    file: Path
    facts: dict[str, Any]
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    done: bool = False

    @classmethod
    def open(cls, file: Path, settings: AdaptSettings, images: str) -> _Record:
        """Read the record of an earlier call, or begin one."""
        facts = {**dataclasses.asdict(settings), "image_list": images}
        facts["options"] = list(settings.options)
        for free in ("num_workers", "device"):  # they do not change what comes out
            del facts[free]
        if not file.exists():
            return cls(file, facts)
        try:
            content = json.loads(file.read_text())
            earlier = content["settings"]
            candidates = [_candidate(entry) for entry in content["candidates"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: remove it to begin anew") from error
        changed = [key for key in facts if earlier.get(key) != facts[key]]
        if changed:
            raise ValueError(
                f"{file.parent} holds an adaptation with another {changed[0]} "
                f"({earlier.get(changed[0])!r}, now {facts[changed[0]]!r}): name another "
                "--output, or remove it"
            )
        return cls(file, facts, candidates, bool(content.get("done")))

    @property
    def folder(self) -> Path:
        """Folder of the adaptation."""
        return self.file.parent

    @property
    def best(self) -> Candidate:
        """The best; of equals the one with the fewest epochs."""
        return max(self.candidates, key=lambda c: (c.value, -c.epochs))

    def add(self, candidate: Candidate) -> None:
        """Note a candidate."""
        self.candidates.append(candidate)
        self._write()

    def result(self, output: Path) -> Adapted:
        """Return what a complete adaptation came to."""
        return Adapted(
            output / ADAPTED_FILE, self.candidates[0], self.best, tuple(self.candidates)
        )

    def finish(self, output: Path) -> Adapted:
        """Note that all is done."""
        self.done = True
        self._write()
        return self.result(output)

    def _write(self) -> None:
        content = {
            "settings": self.facts,
            "done": self.done,
            "candidates": [dataclasses.asdict(c) for c in self.candidates],
            "best_epochs": self.best.epochs,
        }
        write_atomically(json.dumps(content, indent=2) + "\n", self.file)


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    quality = entry["quality"]
    return Candidate(
        entry["epochs"], entry["file"], quality and LabelFreeQuality(**quality)
    )

"""The record of an adaptation: its settings, the scores of its networks, its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.integrity import (
    file_checksum,
    sealed_json,
    unsealed_json,
)
from selcon_plugin.metrics.label_free import LabelFreeQuality

__all__ = ["ADAPTED_FILE", "TRAINING_FOLDER", "AdaptRecord", "Adapted", "Candidate"]

ADAPTED_FILE, TRAINING_FOLDER = "adapted.pth", "training"
# Settings that do not change the result.
_FREE = ("num_workers", "device")
# Settings that the score of the given network does not depend on.
_OF_TRAINING = ("method", "epochs", "learning_rate")
# Of earlier versions: names, sizes and times, which the content replaces.
_FORMER = "image_list"


@dataclass(frozen=True)
class Candidate:
    """A scored network.

    Attributes:
        epochs: Epochs of adaptation; 0 for the given network.
        file: Checkpoint of the network.
        quality: Label-free quality of its features; None if they are not finite.
    """

    epochs: int
    file: str
    quality: LabelFreeQuality | None

    @property
    def value(self) -> float:
        """Return the score by which candidates are compared."""
        return -1.0 if self.quality is None else self.quality.value


@dataclass(frozen=True)
class Adapted:
    """The result of an adaptation.

    Attributes:
        file: Checkpoint of the best network.
        before: The given network.
        best: The network in ``file``.
        candidates: All scored networks, the given one first.
    """

    file: Path
    before: Candidate
    best: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def improved(self) -> bool:
        """Return whether the best network differs from the given one."""
        return self.best.epochs > 0


@dataclass
class AdaptRecord:
    """The record ``adapt.json``.

    Attributes:
        file: Path of the record.
        settings: Settings of the adaptation, with hashes of its files.
        candidates: Networks that are scored.
        done: Whether the adaptation is complete.
        checksum: Checksum of the result; None if it is unknown.
    """

    file: Path
    settings: dict[str, Any]
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    done: bool = False
    checksum: str | None = None

    @classmethod
    def open(cls, file: Path, settings: Any, contents: Mapping[str, str]) -> AdaptRecord:
        """Read the record of an earlier call, or start one.

        Args:
            file: Path of the record.
            settings: Settings of the adaptation, a dataclass.
            contents: Hashes of images and weights by name.

        Returns:
            The record. An adaptation that has trained nothing yet takes other settings.

        Raises:
            ValueError: If the record is damaged, or of another adaptation.
        """
        current = {**dataclasses.asdict(settings), **contents}
        current["options"] = list(settings.options)
        for free in _FREE:
            del current[free]
        if not file.exists():
            return cls(file, current)
        content = unsealed_json(file.read_bytes(), file, remedy="Remove it to start over")
        try:
            earlier = content["settings"]
            candidates = [_candidate(entry) for entry in content["candidates"]]
            changed = _changed(earlier, current)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: remove it to start over") from error
        if not content.get("done"):  # earlier versions measured another criterion
            candidates = [c for c in candidates if _is_comparable(c)]
        if not changed:
            done = bool(content.get("done"))
            return cls(file, current, candidates, done, content.get("result"))
        if not content.get("done") and not _has_trained(file.parent, candidates):
            kept = candidates if set(changed) <= set(_OF_TRAINING) else []
            return cls(file, current, kept)
        raise ValueError(
            f"{file.parent} contains an adaptation with another {changed[0]} "
            f"({earlier.get(changed[0])!r}, now {current[changed[0]]!r}): give another "
            "--output, or remove the folder"
        )

    @property
    def folder(self) -> Path:
        """Return the folder of the adaptation."""
        return self.file.parent

    @property
    def best(self) -> Candidate:
        """Return the best candidate; ties go to the one with the fewest epochs."""
        return max(self.candidates, key=lambda c: (c.value, -c.epochs))

    def add(self, candidate: Candidate) -> None:
        """Record a candidate."""
        self.candidates.append(candidate)
        self._write()

    def result(self) -> Adapted:
        """Return the result of a complete adaptation."""
        file = self.folder / ADAPTED_FILE
        return Adapted(file, self.candidates[0], self.best, tuple(self.candidates))

    def result_is_whole(self) -> bool:
        """Return whether the file of the result is there and as it was written."""
        file = self.folder / ADAPTED_FILE
        if not file.is_file() or not (self.folder / "config.yaml").is_file():
            return False
        return self.checksum is None or file_checksum(file) == self.checksum

    def finish(self) -> Adapted:
        """Record that the adaptation is complete, and return its result."""
        self.done = True
        self.checksum = file_checksum(self.folder / ADAPTED_FILE)
        self._write()
        return self.result()

    def _write(self) -> None:
        content = {
            "settings": self.settings,
            "done": self.done,
            "candidates": [dataclasses.asdict(c) for c in self.candidates],
            "best_epochs": self.best.epochs,
            "result": self.checksum,
        }
        write_atomically(sealed_json(content, indent=2), self.file)


def _changed(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List the settings that differ from those of the record."""
    keys = [key for key in current if key in earlier]
    if "image_content" in earlier:
        keys.remove(_FORMER)
    return [key for key in keys if earlier[key] != current[key]]


def _has_trained(folder: Path, candidates: list[Candidate]) -> bool:
    if any(candidate.epochs for candidate in candidates):
        return True
    training = folder / TRAINING_FOLDER
    return any(training.glob("model_*.pth")) or any(training.glob("model/model*"))


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    quality = entry["quality"]
    if quality and "threshold" not in quality:  # of an earlier version
        known = {"value", "num_clusters", "outlier_ratio", "collapse"}
        quality = {name: value for name, value in quality.items() if name in known}
        quality |= {"threshold": 0.0, "images_per_person": 0.0}
    return Candidate(
        entry["epochs"], entry["file"], quality and LabelFreeQuality(**quality)
    )


def _is_comparable(candidate: Candidate) -> bool:
    return candidate.quality is None or candidate.quality.threshold > 0

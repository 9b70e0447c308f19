"""The records of a run, read from its folder, which may be incomplete or damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.host import Host
from selcon_plugin.datasets.numbering import camera_name
from selcon_plugin.engine.image_list import IMAGE_LIST
from selcon_plugin.io.integrity import unsealed_json
from selcon_plugin.renamed import present_settings
from selcon_plugin.runs.embedding import EmbeddingRecord
from selcon_plugin.runs.metrics import METRICS_FILE, read_metrics
from selcon_plugin.runs.ranked import RankedQuery, read_ranked
from selcon_plugin.runs.results import RESULTS_FILE, read_results

CONFIG_FILE = "config.yaml"

logger = logging.getLogger(__name__)

_Read = TypeVar("_Read")
# Function that returns the host of a run from its settings by full keys; None if unknown.
FindHost = Callable[[Mapping[str, Any]], Host | None]


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """The images that a run was trained on.

    Attributes:
        paths: Image files.
        camids: Camera of each image, -1 if unknown, ``(M,)``.
        pids: Identity of each image, -1 if unknown, ``(M,)``; for diagnostics only.
        num_left_out: Number of files that could not be read when the run started.
        camera_names: Name of each camera; empty for a run of an earlier version.
    """

    paths: tuple[str, ...]
    camids: NDArray[np.int64]
    pids: NDArray[np.int64]
    num_left_out: int
    camera_names: tuple[str, ...] = ()

    def camera(self, number: int) -> str:
        """Return the name of a camera as its user wrote it; "" for an unknown one."""
        if number < 0:
            return ""
        known = number < len(self.camera_names)
        return self.camera_names[number] if known else camera_name(number)

    @property
    def identities_known(self) -> bool:
        """Return whether all identities are known, and neither all equal nor distinct."""
        distinct = len(set(self.pids.tolist()))
        return bool((self.pids >= 0).all()) and 1 < distinct < len(self.pids)


@dataclass(frozen=True, eq=False)
class Curve:
    """A metric over the epochs.

    Attributes:
        epochs: Times of the measurements, in epochs trained.
        values: The measured values.
    """

    epochs: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float | None:
        """Return the last value, or None if the metric was never measured."""
        return self.values[-1] if self.values else None


@dataclass(frozen=True, eq=False)
class RunData:
    """The records of a run, as read from its folder.

    Attributes:
        folder: Folder of the run.
        results: ``results.json`` of a finished run, else empty.
        curves: Metrics measured during training, by name.
        settings: Config by full keys; empty if unknown.
        defaults: Default values of the keys; None if unknown.
        images: The training images; None if unknown.
        embedding: Features and clusters; None if unknown.
        ranked: Ranked results of the last evaluation, by test set.
        broken: Descriptions of the records that could not be read.
        host: Package of the host that trained the run; empty if unknown.
    """

    folder: Path
    results: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] | None = None
    images: TrainingImages | None = None
    embedding: EmbeddingRecord | None = None
    ranked: Mapping[str, list[RankedQuery]] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    host: str = ""

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name

    def setting(self, name: str) -> Any:
        """Return a setting of the plugin by the name of its option; None if unknown."""
        # Every host's config has a plugin node of this name, in upper or lower case.
        end = f".selcon.{name}"
        found = (v for k, v in self.settings.items() if f".{k}".lower().endswith(end))
        return next(found, None)

    def curve(self, name: str) -> Curve:
        """Return a metric over the epochs; an empty curve if it was not measured."""
        return self.curves.get(name, Curve((), ()))

    @property
    def metrics(self) -> dict[str, Mapping[str, float]]:
        """Return the final metrics in percent, by test set and by name."""
        found = self.results.get("metrics")
        if isinstance(found, Mapping):
            return {n: m for n, m in found.items() if isinstance(m, Mapping)}
        after = self.results.get("after")  # the format of the demo
        return {"after training": after} if isinstance(after, Mapping) else {}


def collect_run(
    folder: str | Path,
    *,
    find_host: FindHost | None = None,
) -> RunData:
    """Read the records of a run; missing and damaged ones are left out.

    Args:
        folder: Folder of a run, finished or not.
        find_host: Returns the host of a run's settings, which knows their defaults.

    Returns:
        The run.

    Raises:
        FileNotFoundError: If the folder does not exist, or contains no run.
        ValueError: If all of its records are damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist")
    reader = _Reader()
    results = reader.read(lambda: read_results(folder / RESULTS_FILE)) or {}
    settings = reader.read(lambda: _read_settings(folder / CONFIG_FILE)) or {}
    images = reader.read(lambda: _read_images(folder / IMAGE_LIST))
    records = reader.read(lambda: reader.metrics(folder / METRICS_FILE)) or []
    if not (results or records or images) and reader.broken:
        raise ValueError("; ".join(reader.broken))
    if not (results or records or images):
        raise FileNotFoundError(
            f"{folder} contains no run: it has neither {RESULTS_FILE} nor {METRICS_FILE} "
            f"nor {IMAGE_LIST}. Give the run's OUTPUT_DIR (torchreid: data.save_dir)"
        )
    embedding = reader.read(lambda: EmbeddingRecord.load(folder))
    if embedding and (images is None or len(embedding.labels) != len(images.paths)):
        embedding = None
        reader.broken.append("the recorded features belong to other images")
    host = find_host(settings) if find_host and settings else None
    return RunData(
        folder,
        results,
        _curves(records, results),
        settings,
        reader.read(lambda: host.default_values(settings)) if host else None,
        images,
        embedding,
        reader.read(lambda: read_ranked(folder)) or {},
        tuple(reader.broken),
        host.name if host else str(results.get("host", "")),
    )


def cameras_of_clusters(
    labels: NDArray[np.integer], camids: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Count the cameras of each cluster.

    Args:
        labels: Cluster of each image, -1 for an outlier, ``(M,)``.
        camids: Camera of each image, -1 if unknown, ``(M,)``.

    Returns:
        Number of known cameras of each cluster.

    Example:
        >>> labels, camids = np.array([0, 0, 1, 1, -1]), np.array([3, 4, 3, 3, 5])
        >>> cameras_of_clusters(labels, camids).tolist()
        [2, 1]
    """
    inside = (labels >= 0) & (camids >= 0)
    pairs = np.unique(np.stack([labels[inside], camids[inside]]), axis=1)
    counts: NDArray[np.int64] = np.bincount(
        pairs[0], minlength=int(labels.max(initial=-1)) + 1
    )
    return counts


# What reading a damaged file raises.
_DAMAGED = (ValueError, TypeError, LookupError, OverflowError, OSError, ImportError)


class _Reader:
    """A reader of files, any of which may be missing or damaged."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def read(self, function: Callable[[], _Read]) -> _Read | None:
        try:
            return function()
        except FileNotFoundError:
            return None
        except _DAMAGED as error:
            self.broken.append(" ".join(str(error).split()))
            return None

    def metrics(self, file: Path) -> list[dict[str, float]]:
        return read_metrics(file, on_damage=self.broken.append)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} is damaged: it holds {type(content).__name__}, no keys. Restore a "
            "copy of it"
        )
    return present_settings(flatten_config(content))


def _read_images(file: Path) -> TrainingImages:
    content = unsealed_json(file.read_bytes(), file)
    try:
        rows = content["images"]
        return TrainingImages(
            tuple(str(row[0]) for row in rows),
            np.array([row[2] for row in rows], dtype=np.int64),
            np.array([row[3] for row in rows], dtype=np.int64),
            int(content.get("num_left_out", 0)),
            tuple(str(name) for name in content.get("camera_names", ())),
        )
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"{file} is damaged: {error!r}. Restore a copy of it") from error


def _curves(
    records: list[dict[str, float]], results: Mapping[str, Any]
) -> dict[str, Curve]:
    """Group the measurements by name, over epochs if their length is known, else steps."""
    steps, epochs = results.get("steps"), results.get("epochs")
    per_epoch = steps / epochs if steps and epochs else 1.0
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        # Clusters are computed before a step, everything else is measured after it.
        done = record["iteration"] + ("num_clusters" not in record)
        if steps and done > steps:
            continue  # left by an earlier, longer run in the same folder
        for name, value in record.items():
            if name != "iteration" and isinstance(value, (int, float)):
                points.setdefault(name, []).append((done / per_epoch, float(value)))
    for metrics in (results.get("metrics") or {}).values():
        # FastReID's writers do not record the final evaluation.
        for name in ("mAP", "Rank-1"):
            known = points.setdefault(name, [])
            if epochs and name in metrics and (not known or known[-1][0] < epochs):
                known.append((float(epochs), float(metrics[name])))
        break
    return {
        name: Curve(tuple(x for x, _ in known), tuple(y for _, y in known))
        for name, known in points.items()
        if known
    }

"""A two-dimensional t-SNE map of the training images, colored by cluster or camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from selcon_plugin.report.charts import NUM_COLORS, LegendEntry, marker_path, number
from selcon_plugin.report.collect import RunData, TrainingImages
from selcon_plugin.report.crops import Crops, Sprite, short_paths

_WIDTH, _HEIGHT, _MARGIN = 800, 560, 16
# Five shapes and seven colors have no common factor, so 35 groups look different.
_DISTINCT = 35
_LISTED = 14
_PERPLEXITY = 30.0


@dataclass(frozen=True)
class MapView:
    """The map in one coloring.

    Attributes:
        name: Groups that the colors show: ``"cluster"`` or ``"camera"``.
        shown: Whether this view is shown first.
        description: Text alternative for screen readers.
        drawing: Content of the SVG element.
        legend: The groups, the largest first.
    """

    name: str
    shown: bool
    description: str
    drawing: Markup
    legend: Sequence[LegendEntry]


@dataclass(frozen=True)
class EmbeddingMap:
    """The map in all its colorings, ready for the template.

    Attributes:
        subset: Text that describes which images are on the map.
        time: Text that describes when the features were computed.
        views: The map in each coloring.
        sprite: Crops of the points; None if images are disabled.
        data: Points and layout of the sprite sheet, for the script.
        size: Width and height of the drawing.
    """

    subset: str
    time: str
    views: Sequence[MapView]
    sprite: Sprite | None
    data: dict[str, Any]
    size: tuple[int, int] = (_WIDTH, _HEIGHT)


def lay_out(points: NDArray[np.floating], seed: int = 0) -> NDArray[np.float64]:
    """Compute a two-dimensional t-SNE layout, initialized with the principal components.

    The method is that of van der Maaten and Hinton, "Visualizing data using t-SNE", 2008;
    the initialization that of Kobak and Berens, "The art of using t-SNE for single-cell
    transcriptomics", 2019.

    Args:
        points: Leading principal components, largest first, ``(K, P)``.
        seed: Seed of the layout.

    Returns:
        Positions ``(K, 2)`` in the unit square.
    """
    data = points.astype(np.float32)
    plane = np.zeros((len(data), 2), dtype=np.float32)
    plane[:, : min(2, data.shape[1])] = data[:, :2]
    spread = float(plane[:, 0].std()) if len(plane) else 0.0
    if len(data) > 4 and spread > 0:
        from sklearn.manifold import TSNE

        perplexity = min(_PERPLEXITY, (len(data) - 1) / 3)
        layout = TSNE(perplexity=perplexity, init=plane / spread * 1e-4, random_state=seed)
        plane = layout.fit_transform(data)
    low, high = plane.min(axis=0, initial=0), plane.max(axis=0, initial=0)
    if len(plane):
        low, high = plane.min(axis=0), plane.max(axis=0)
    places: NDArray[np.float64] = (plane - low) / np.maximum(high - low, 1e-12)
    return places


def embedding_map(run: RunData, crops: Crops) -> EmbeddingMap | None:
    """Draw the map, colored by cluster and by camera.

    Args:
        run: The run.
        crops: Encodes the crops that are shown for each point.

    Returns:
        The map; None if features or images are unknown.
    """
    record, images = run.embedding, run.images
    if record is None or images is None or not len(record.sample):
        return None
    places = (
        lay_out(record.points) * (_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN) + _MARGIN
    )
    labels = record.labels[record.sample]
    cameras = images.camids[record.sample]
    views: list[tuple[str, NDArray[Any], str]] = []
    if record.clustered:
        views.append(("cluster", labels, "no cluster"))
    if len(np.unique(cameras)) > 1 or not views:
        views.append(("camera", cameras, "camera unknown"))
    sprite = crops.sprite([images.paths[i] for i in record.sample])
    names = short_paths(images.paths)
    points = [
        [
            *(round(float(x), 1), round(float(y), 1), names[i]),
            *(int(label), images.camera(int(camera))),
        ]
        for (x, y), i, label, camera in zip(
            places, record.sample, labels, cameras, strict=True
        )
    ]
    layout = sprite and {
        "columns": sprite.columns,
        "rows": sprite.rows,
        "cell": sprite.cell,
    }
    count, total = len(record.sample), len(record.labels)
    return EmbeddingMap(
        f"{number(count)} of {number(total)} images" if count < total else "All images",
        f"epoch {record.epoch}" if record.epoch else "the start of training",
        [
            _view(name, groups, rest, places, images, shown=index == 0)
            for index, (name, groups, rest) in enumerate(views)
        ],
        sprite,
        {"points": points, "sprite": layout, "clustered": record.clustered},
    )


def _view(
    name: str,
    groups: NDArray[Any],
    rest: str,
    places: NDArray[np.float64],
    images: TrainingImages,
    *,
    shown: bool,
) -> MapView:
    """Draw the points of all groups, the largest first, and the legend."""
    known, counts = np.unique(groups[groups >= 0], return_counts=True)
    order = known[np.argsort(-counts, kind="stable")].tolist()
    if name == "camera":
        order.sort()
    drawing = Markup()
    legend: list[LegendEntry] = []
    ungrouped = groups < 0
    others = np.isin(groups, order[_DISTINCT:])
    if ungrouped.any():
        drawing += _marks("rest", 0, places[ungrouped], 1.6)
        legend.append(_entry("rest", 0, f"{rest} ({int(ungrouped.sum())})"))
    if others.any():
        drawing += _marks("other", 0, places[others], 2.4)
        legend.append(_entry("other", 0, f"smaller {name}s ({int(others.sum())})"))
    for index, group in enumerate(order[:_DISTINCT]):
        chosen = groups == group
        color = f"fc{index % NUM_COLORS}"
        drawing += _marks(color, index, places[chosen], 3.2, f"{name}-{group}")
        if index < _LISTED:
            label = images.camera(group) if name == "camera" else group
            text = f"{name} {label} ({int(chosen.sum())})"
            legend.insert(index, _entry(color, index, text, f"{name}-{group}"))
    description = f"Map of {len(places)} images colored by {name}"
    return MapView(name, shown, description, drawing, legend)


def _marks(
    color: str, index: int, places: NDArray[np.float64], size: float, group: str = ""
) -> Markup:
    path = "".join(marker_path(index, float(x), float(y), size) for x, y in places)
    named = Markup(' data-group="{}"').format(group) if group else ""
    return Markup('<path class="mark {}"{} d="{}"/>').format(color, named, path)


def _entry(color: str, index: int, text: str, group: str = "") -> LegendEntry:
    marker = Markup('<path class="mark {}" d="{}"/>').format(
        color, marker_path(index, 6, 6, 3.6)
    )
    return LegendEntry(text, marker, group)

"""A map of the images: near each other where their features are."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.report.charts import NUM_COLORS, marker_path
from selcon_plugin.report.collect import RunData
from selcon_plugin.report.crops import Crops, short_paths

_WIDTH, _HEIGHT, _MARGIN = 800, 560, 16
# Five shapes and seven colors have no common factor: so many pairs are distinct.
_DISTINCT = 35
_LISTED = 14
_PERPLEXITY = 30.0


def lay_out(points: NDArray[np.floating], seed: int = 0) -> NDArray[np.float64]:
    """Lay points out in the plane by t-SNE, begun at their principal components.

    Van der Maaten and Hinton, "Visualizing data using t-SNE", 2008; the start as in Kobak
    and Berens, "The art of using t-SNE for single-cell transcriptomics", 2019.

    Args:
        points: Leading principal components, largest first, ``(K, P)``.
        seed: Seed of the layout.

    Returns:
        Places ``(K, 2)`` in the unit square.
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


def embedding_map(run: RunData, crops: Crops) -> str:
    """Draw the map, colored by cluster and by camera.

    Args:
        run: The run.
        crops: Makes the pictures that are shown at a point.

    Returns:
        HTML; empty where features or images are not known.
    """
    record, images = run.embedding, run.images
    if record is None or images is None or not len(record.sample):
        return ""
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
    data = {
        "points": [
            [round(float(x), 1), round(float(y), 1), names[i], int(label), int(camera)]
            for (x, y), i, label, camera in zip(
                places, record.sample, labels, cameras, strict=True
            )
        ],
        "sprite": sprite
        and {"columns": sprite.columns, "rows": sprite.rows, "cell": sprite.cell},
    }
    radios = "".join(
        f'<input type="radio" name="view" id="by-{name}" value="{name}"'
        f"{' checked' * (name == views[0][0])}>"
        f'<label for="by-{name}">Color by {name}</label>'
        for name, _, _ in views
    )
    drawn = "".join(
        _view(name, groups, rest, places, shown=number == 0)
        for number, (name, groups, rest) in enumerate(views)
    )
    style = f' style="background-image:url({sprite.uri})"' if sprite else ""
    return (
        '<fieldset class="toggle"><legend class="hidden">Colors of the map</legend>'
        f'{radios}</fieldset><div class="map" id="map-box" tabindex="0" role="group" '
        f'aria-label="Map of {len(places)} images. Arrow keys go from image to image." '
        f'aria-describedby="map-now">{drawn}'
        f'<div class="tip" id="map-tip" hidden><div class="crop"{style}></div>'
        '<div id="map-text"></div></div></div>'
        '<p class="hidden" id="map-now" aria-live="polite"></p>'
        f'<script type="application/json" id="map-data">{in_script(data)}</script>'
    )


def _view(
    name: str,
    groups: NDArray[Any],
    rest: str,
    places: NDArray[np.float64],
    *,
    shown: bool,
) -> str:
    """Draw the points of all groups, largest first, and the legend."""
    known, counts = np.unique(groups[groups >= 0], return_counts=True)
    order = known[np.argsort(-counts, kind="stable")].tolist()
    if name == "camera":
        order.sort()
    parts, entries = [], []
    loose = groups < 0
    others = np.isin(groups, order[_DISTINCT:])
    if loose.any():
        parts.append(_marks("rest", 0, places[loose], 1.6))
        entries.append(_entry("rest", 0, f"{rest} ({int(loose.sum())})"))
    if others.any():
        parts.append(_marks("other", 0, places[others], 2.4))
        entries.append(_entry("other", 0, f"smaller {name}s ({int(others.sum())})"))
    for number, group in enumerate(order[:_DISTINCT]):
        chosen = groups == group
        color = f"fc{number % NUM_COLORS}"
        parts.append(_marks(color, number, places[chosen], 3.2, f"{name}-{group}"))
        if number < _LISTED:
            text = f"{name} {group} ({int(chosen.sum())})"
            entries.insert(number, _entry(color, number, text, f"{name}-{group}"))
    title = f"Map of {len(places)} images colored by {name}"
    hidden = "" if shown else " hidden"
    return (
        f'<div class="view" id="view-{name}"{hidden}><h3 class="print">By {name}</h3>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{"".join(parts)}<circle class="ring" r="8" cx="-20" cy="-20"/></svg>'
        f'<ul class="legend keys">{"".join(entries)}</ul></div>'
    )


def _marks(
    color: str, number: int, places: NDArray[np.float64], size: float, group: str = ""
) -> str:
    path = "".join(marker_path(number, float(x), float(y), size) for x, y in places)
    named = f' data-group="{escape(group)}"' if group else ""
    return f'<path class="mark {color}"{named} d="{path}"/>'


def _entry(color: str, number: int, text: str, group: str = "") -> str:
    marker = (
        f'<svg viewBox="0 0 12 12" aria-hidden="true"><path class="mark {color}" '
        f'd="{marker_path(number, 6, 6, 3.6)}"/></svg>'
    )
    if not group:
        return f"<li>{marker}{escape(text)}</li>"
    return (
        f'<li><button type="button" aria-pressed="false" data-group="{escape(group)}">'
        f"{marker}{escape(text)}</button></li>"
    )


def in_script(data: object) -> str:
    """Write data as JSON that cannot end the script element around it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")

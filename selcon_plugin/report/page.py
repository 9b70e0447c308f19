"""The report of one run: a page that needs nothing but itself."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from selcon_plugin.report.charts import UNKNOWN, Series, line_chart, number, table
from selcon_plugin.report.collect import RunData, cameras_of_clusters
from selcon_plugin.report.crops import Crops, short_paths
from selcon_plugin.report.embedding_map import embedding_map
from selcon_plugin.report.notes import Note, find_notes
from selcon_plugin.runs.embedding import (
    OTHER_CAMERA,
    SAME_CAMERA,
    SAME_CLUSTER,
    UNKNOWN_CAMERA,
)
from selcon_plugin.runs.ranked import RankedImage, RankedQuery

_SHEETS = 6  # clusters of each kind
_SHEET_CROPS = 8
_SMALLEST_SHOWN = 4
_LISTED_CLUSTERS = 100


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: Its id.
        title: Its heading.
        body: HTML; a section without is left out.
    """

    anchor: str
    title: str
    body: str


def run_page(run: RunData, *, images: bool = True) -> str:
    """Build the report of a run.

    Args:
        run: The run.
        images: Whether crops are shown.

    Returns:
        A complete HTML document.
    """
    crops = Crops(images)
    sections = [
        Section("summary", "Summary", _tiles(headline(run)) + _notes(find_notes(run))),
        Section("curves", "Training", _curves(run)),
        Section("map", "Map of the images", _map(run, crops)),
        Section("clusters", "Clusters", _clusters(run, crops)),
        Section("distances", "Distances", _distances(run)),
        Section("ranked", *_ranked(run, crops)),
        Section("settings", "Settings", _settings(run)),
        Section("about", "About this run", _about(run)),
    ]
    method = run.results.get("method") or run.setting("method") or "method not known"
    subtitle = f"{method} in {run.host}" if run.host else str(method)
    return document(f"Report: {run.name}", run.name, subtitle, sections)


def document(title: str, heading: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Put sections into a page.

    Args:
        title: Of the window.
        heading: Of the page.
        subtitle: Below it.
        sections: In order; those without a body are left out.

    Returns:
        A complete HTML document with style and script inside.
    """
    shown = [section for section in sections if section.body]
    links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in shown)
    parts = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">'
        f'<h2 id="{s.anchor}-title">{escape(s.title)}</h2>{s.body}</section>'
        for s in shown
    )
    # The policy forbids every request: what is shown is in the file.
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_asset('style.css')}</style></head><body>"
        '<a class="skip" href="#content">Skip to content</a>'
        f"<header><h1>{escape(heading)}</h1><p>{escape(subtitle)}</p></header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'<main id="content" tabindex="-1">{parts}</main>'
        "<footer><p>Written by <code>selcon report</code>. This file holds all that it "
        "shows and asks no server for anything.</p></footer>"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    files = importlib.resources.files("selcon_plugin.report")
    return files.joinpath(name).read_text(encoding="utf-8")


# --- summary ------------------------------------------------------------------------------


def headline(run: RunData) -> list[tuple[str, str]]:
    """List the figures that a reader looks for first.

    Args:
        run: The run.

    Returns:
        Names and figures, in words.
    """
    found: list[tuple[str, str]] = []
    several = len(run.metrics) > 1
    for name, metrics in run.metrics.items():
        for metric in ("mAP", "Rank-1", "mINP"):
            if isinstance(metrics.get(metric), (int, float)):
                label = f"{metric}, {name}" if several else metric
                found.append((label, f"{metrics[metric]:.1f} %"))
    clusters = run.curve("num_clusters").last
    outliers = run.curve("outlier_ratio").last
    if clusters is not None:
        found.append(("Clusters", number(clusters)))
    if outliers is not None:
        found.append(("In no cluster", f"{100 * outliers:.0f} %"))
    if run.images is not None:
        cameras = len(np.unique(run.images.camids[run.images.camids >= 0]))
        found.append(("Images", number(len(run.images.paths))))
        found.append(("Cameras", number(cameras) if cameras else "not known"))
    elif "num_images" in run.results:
        found.append(("Images", number(run.results["num_images"])))
    if "epochs" in run.results:
        found.append(("Epochs", number(run.results["epochs"])))
    if "train_seconds" in run.results:
        found.append(("Training time", duration(run.results["train_seconds"])))
    return found


def duration(seconds: float) -> str:
    """Write a time in the two units that matter.

    Args:
        seconds: How long.

    Returns:
        In words.

    Example:
        >>> duration(8000), duration(75.2), duration(3.14)
        ('2 h 13 min', '1 min 15 s', '3.1 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _tiles(figures: Iterable[tuple[str, str]]) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in figures
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _notes(notes: Sequence[Note]) -> str:
    words = {"warning": "Warning", "info": "Note"}
    items = "".join(
        f'<li class="{note.level}"><strong>{words[note.level]}:</strong> '
        f"{escape(note.text)} {escape(note.remedy)}</li>"
        for note in notes
    )
    listed = f'<ul class="notes">{items}</ul>' if items else ""
    if any(note.level == "warning" for note in notes):
        return listed
    return f'<p class="good">No warnings.</p>{listed}'


# --- curves -------------------------------------------------------------------------------

# Title, axis, whether it begins at 0, factor, figures by name with their words.
_CHARTS: tuple[tuple[str, str, bool, float, dict[str, str]], ...] = (
    ("Learning rate", "", True, 1.0, {"lr": "learning rate"}),
    ("Clusters", "", True, 1.0, {"num_clusters": "clusters"}),
    ("Images in no cluster", "%", True, 100.0, {"outlier_ratio": "in no cluster"}),
    (
        "Quality of the clusters, told without labels",
        "",
        False,
        1.0,
        {"silhouette": "silhouette", "stability": "agreement with the epoch before"},
    ),
    (
        "Quality of the clusters, told by the identities",
        "",
        True,
        1.0,
        {"ami": "adjusted mutual information", "purity": "purity"},
    ),
    (
        "Chosen neighbors that are the same person",
        "%",
        True,
        100.0,
        {"neighbor_precision": "same person"},
    ),
    ("Effective rank of the features", "", True, 1.0, {"effective_rank": "effective rank"}),
)


def loss_series(run: RunData) -> list[Series]:
    """Return the losses over the epochs, their sum first.

    Args:
        run: The run.

    Returns:
        A line per loss; the sum alone where it has one part.
    """
    names = sorted(n for n in run.curves if n.startswith("loss") and n != "loss_scale")
    lines = [("total_loss", "total")] if "total_loss" in run.curves else []
    if len(names) > 1:
        lines += [(name, name.removeprefix("loss_").replace("_", " ")) for name in names]
    return [Series(word, run.curve(n).epochs, run.curve(n).values) for n, word in lines]


def epoch_label(run: RunData) -> str:
    """Return what the axis of a run's curves counts."""
    known = run.results.get("steps") and run.results.get("epochs")
    return "epochs trained" if known else "steps trained"


def accuracy_series(run: RunData) -> list[Series]:
    """Return mAP and Rank-1 over the epochs, of each test set."""
    return [
        Series(name, curve.epochs, curve.values)
        for name, curve in run.curves.items()
        if name.split("/")[-1] in ("mAP", "Rank-1")
    ]


def _curves(run: RunData) -> str:
    x_label = epoch_label(run)
    charts = [line_chart(loss_series(run), title="Loss", x_label=x_label)]
    accuracy = accuracy_series(run)
    charts.append(
        line_chart(accuracy, title="Accuracy on the test set", x_label=x_label, y_label="%")
    )
    for title, unit, from_zero, factor, names in _CHARTS:
        lines = [
            Series(word, curve.epochs, [factor * value for value in curve.values])
            for name, word in names.items()
            if (curve := run.curve(name)).values
        ]
        charts.append(
            line_chart(
                lines, title=title, x_label=x_label, y_label=unit, from_zero=from_zero
            )
        )
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


# --- what was learned ---------------------------------------------------------------------


def _map(run: RunData, crops: Crops) -> str:
    drawn = embedding_map(run, crops)
    if not drawn:
        return ""
    assert run.embedding is not None
    count, total = len(run.embedding.sample), len(run.embedding.labels)
    which = f"{number(count)} of {number(total)} images" if count < total else "All images"
    return (
        f"<p>{which}, laid out by t-SNE: neighbors on the map have similar features; "
        "distances between far groups mean little. Features as of "
        f"{_when(run.embedding.epoch)}.</p>{drawn}"
    )


def _when(epoch: int) -> str:
    return f"epoch {epoch}" if epoch else "the start"


def _clusters(run: RunData, crops: Crops) -> str:
    record, images = run.embedding, run.images
    if record is None or images is None or not record.clustered:
        return ""
    sizes = np.bincount(record.labels[record.labels >= 0], minlength=record.num_clusters)
    cameras = cameras_of_clusters(record.labels, images.camids)
    tightness = _mean_silhouettes(run, sizes)
    by_size = np.argsort(-sizes, kind="stable").tolist()
    judged = [
        c for c in by_size if sizes[c] >= _SMALLEST_SHOWN and math.isfinite(tightness[c])
    ]
    kinds = {
        "Largest": by_size,
        "Tightest": sorted(judged, key=lambda c: -tightness[c]),
        "Most doubtful": sorted(judged, key=lambda c: tightness[c]),
    }
    names = short_paths(images.paths)
    caption = _ClusterCaption(run, sizes, cameras, tightness)
    sheets = "".join(
        f"<h3>{kind}</h3><div class='sheets'>"
        + "".join(_sheet(run, crops, c, caption, names) for c in chosen[:_SHEETS])
        + "</div>"
        for kind, chosen in kinds.items()
        if chosen
    )
    rows = [
        [
            str(c),
            str(sizes[c]),
            str(cameras[c]) if cameras[c] else UNKNOWN,
            number(round(float(tightness[c]), 3)),
        ]
        for c in by_size[:_LISTED_CLUSTERS]
    ]
    heading = "All clusters" if len(rows) == len(sizes) else f"The {len(rows)} largest"
    return (
        "<p>A silhouette near 1 says that a cluster lies apart from all others, below 0 "
        "that another is nearer. Crops go from the most to the least typical. Tightest "
        f"and most doubtful are those of {_SMALLEST_SHOWN} images or more.</p>{sheets}"
        f"<details><summary>{heading}, as a table</summary>"
        f"{table(['Cluster', 'Images', 'Cameras', 'Silhouette'], rows)}</details>"
    )


def _mean_silhouettes(run: RunData, sizes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    assert run.embedding is not None
    labels, values = run.embedding.labels, run.embedding.silhouette.astype(np.float64)
    inside = labels >= 0
    sums = np.bincount(labels[inside], weights=values[inside], minlength=len(sizes))
    means: np.ndarray[Any, Any] = sums / np.maximum(sizes, 1)
    return means


@dataclass(frozen=True, eq=False)
class _ClusterCaption:
    """Says in a line what a cluster is like."""

    run: RunData
    sizes: np.ndarray[Any, Any]
    cameras: np.ndarray[Any, Any]
    tightness: np.ndarray[Any, Any]

    def __call__(self, cluster: int) -> str:
        images, record = self.run.images, self.run.embedding
        assert images is not None
        assert record is not None
        parts = [plural(int(self.sizes[cluster]), "image")]
        if self.cameras[cluster]:
            parts.append(plural(int(self.cameras[cluster]), "camera"))
        if math.isfinite(self.tightness[cluster]):
            parts.append(f"silhouette {round(self.tightness[cluster], 2) + 0.0:.2f}")
        if images.identities_known:
            people = len(np.unique(images.pids[record.labels == cluster]))
            parts.append(plural(people, "true identity", "true identities"))
        return f"Cluster {cluster}: {', '.join(parts)}"


def plural(count: int, word: str, words: str = "") -> str:
    """Write a number and what is counted.

    Args:
        count: How many.
        word: What, of one.
        words: What, of several; by default the word with an s.

    Returns:
        In words.

    Example:
        >>> plural(1, "image"), plural(2, "image")
        ('1 image', '2 images')
    """
    return f"{count} {word if count == 1 else words or word + 's'}"


def _sheet(
    run: RunData,
    crops: Crops,
    cluster: int,
    caption: Callable[[int], str],
    names: Sequence[str],
) -> str:
    record, images = run.embedding, run.images
    assert record is not None
    assert images is not None
    members = np.flatnonzero(record.labels == cluster)
    typical = np.nan_to_num(record.silhouette[members].astype(np.float64))
    members = members[np.argsort(-typical, kind="stable")]
    count = min(_SHEET_CROPS, len(members))
    chosen = members[np.linspace(0, len(members) - 1, count).round().astype(int)]
    cells = "".join(
        f"<li>{_crop(crops, images.paths[i], words)}</li>"
        for i in chosen.tolist()
        for words in [_image_words(names[i], images.camids[i])]
    )
    return (
        f'<figure class="sheet"><figcaption>{escape(caption(cluster))}</figcaption>'
        f'<ul class="crops">{cells}</ul></figure>'
    )


def _image_words(name: str, camid: int) -> str:
    return f"{name}, camera {camid}" if camid >= 0 else name


def _crop(crops: Crops, path: str, words: str) -> str:
    uri = crops.uri(path)
    if not uri:
        return f'<span class="nocrop">{escape(words)}</span>'
    said = escape(words)
    return f'<img src="{uri}" alt="{said}" title="{said}" width="64" height="128">'


def _distances(run: RunData) -> str:
    record = run.embedding
    if record is None or not record.counts.any():
        return ""
    names = {
        SAME_CAMERA: "from one camera",
        OTHER_CAMERA: "from two cameras",
        UNKNOWN_CAMERA: "cameras not known",
        SAME_CLUSTER: "in one cluster",
    }
    left = record.edges[:-1].tolist()
    lines = []
    for row, name in names.items():
        total = int(record.counts[row].sum())
        if total:
            shares = (100.0 * record.counts[row] / total).tolist()
            lines.append(Series(f"{name} ({number(total)} pairs)", left, shares))
    rule = (record.eps, f"eps {number(record.eps)}") if math.isfinite(record.eps) else None
    chart = line_chart(
        lines,
        title=f"{record.distance} distance of pairs of images",
        x_label=f"{record.distance} distance",
        y_label="% of the pairs of a line",
        steps=True,
        rule=rule,
        from_zero=True,
    )
    told = ""
    if record.distance == "Jaccard":
        told = (
            " Pairs at distance 1, without a common neighbor, are not counted, nor those "
            f"farther than {number(round(record.reach, 2))}, which were not computed."
        )
    return (
        "<p>Clusters are clean where pairs of one cluster lie left of the bulk, and do not "
        "follow cameras where pairs from one camera and from two are spread alike. DBSCAN "
        f"takes images within eps for neighbors.{told}</p>"
        f'<div class="charts wide">{chart}</div>'
    )


# --- ranked lists -------------------------------------------------------------------------


def _ranked(run: RunData, crops: Crops) -> tuple[str, str]:
    """Return title and body: hits and misses of a test set, else neighbors."""
    if run.ranked:
        legend = (
            "<p>Queries evenly spaced over the test set, each with the gallery images "
            'ranked first. <span class="hit">✓ same person</span> '
            '<span class="miss">✗ another person</span>. Images of the same person from '
            "the query's own camera are left out, as the protocol says.</p>"
        )
        several = len(run.ranked) > 1
        body = "".join(
            (f"<h3>{escape(name)}</h3>" if several else "")
            + "".join(_query_row(query, crops) for query in queries)
            for name, queries in run.ranked.items()
        )
        return "Ranked results", legend + body
    return "Nearest neighbors", _neighbors(run, crops)


def _query_row(query: RankedQuery, crops: Crops) -> str:
    precision = query.average_precision
    known = "" if math.isnan(precision) else f", average precision {100 * precision:.0f} %"
    title = f"Person {query.pid}, camera {query.camid}{known}"
    cells = "".join(
        _result(place, result, crops) for place, result in enumerate(query.results, start=1)
    )
    words = f"query {Path(query.path).name}, camera {query.camid}"
    return (
        f'<figure class="ranks"><figcaption>{escape(title)}</figcaption><ul class="crops">'
        f'<li class="query">{_crop(crops, query.path, words)}<span>query</span></li>{cells}'
        "</ul></figure>"
    )


def _result(place: int, result: RankedImage, crops: Crops) -> str:
    kind, sign, said = (
        ("hit", "✓", "same person") if result.right else ("miss", "✗", "another person")
    )
    words = (
        f"rank {place}, {said}: {Path(result.path).name}, camera {result.camid}, "
        f"distance {result.distance:.3g}"
    )
    return (
        f'<li class="{kind}">{_crop(crops, result.path, words)}'
        f"<span>{sign} {place}</span></li>"
    )


def _neighbors(run: RunData, crops: Crops) -> str:
    record, images = run.embedding, run.images
    if record is None or images is None or not len(record.anchors):
        return ""
    names = short_paths(images.paths)

    def label(i: int) -> str:
        if not record.clustered:
            return _image_words(names[i], images.camids[i])
        cluster = f"cluster {record.labels[i]}" if record.labels[i] >= 0 else "no cluster"
        return f"{_image_words(names[i], images.camids[i])}, {cluster}"

    rows = []
    for row, anchor in enumerate(record.anchors.tolist()):
        cells = "".join(
            f"<li>{_crop(crops, images.paths[i], label(i))}<span>{cosine:.2f}</span></li>"
            for i, cosine in zip(
                record.neighbors[row].tolist(), record.similarity[row].tolist(), strict=True
            )
        )
        rows.append(
            f'<figure class="ranks"><figcaption>{escape(label(anchor))}</figcaption>'
            '<ul class="crops"><li class="query">'
            f"{_crop(crops, images.paths[anchor], label(anchor))}<span>image</span></li>"
            f"{cells}</ul></figure>"
        )
    return (
        "<p>Training images evenly spaced over the list, each with the images whose "
        "features are nearest, and their cosines. Whether they show the same person "
        f"is yours to judge.</p>{''.join(rows)}"
    )


# --- settings and the rest ----------------------------------------------------------------


def changed_settings(run: RunData) -> dict[str, tuple[Any, Any]] | None:
    """Compare a run's config with the defaults.

    Args:
        run: The run.

    Returns:
        Value and default of the keys that differ; None where the defaults are not known.
    """
    if run.defaults is None:
        return None
    return {
        key: (value, run.defaults.get(key))
        for key, value in run.settings.items()
        if key not in run.defaults or run.defaults[key] != value
    }


def _settings(run: RunData) -> str:
    if not run.settings:
        return ""
    changed = changed_settings(run)
    top = ""
    if changed:
        rows = [
            [key, str(value), str(default)] for key, (value, default) in changed.items()
        ]
        top = (
            "<h3>What differs from the defaults</h3>"
            f"{table(['Key', 'Value', 'Default'], rows)}"
        )
    elif changed is None:
        top = "<p>The defaults are not known here: the host is not installed.</p>"
    marked = changed or {}
    rows = [
        [key, str(value), "changed" if key in marked else ""]
        for key, value in run.settings.items()
    ]
    return (
        f"{top}<details><summary>The full config ({len(rows)} keys)</summary>"
        f"{table(['Key', 'Value', 'Mark'], rows)}</details>"
    )


def _about(run: RunData) -> str:
    results = run.results
    rows = [["Folder", str(run.folder.resolve())]]
    for key, name in (
        ("method", "Method"),
        ("seed", "Seed"),
        ("steps", "Steps"),
        ("num_processes", "Processes"),
        ("device", "Device"),
    ):
        if results.get(key) is not None:
            rows.append([name, str(results[key])])
    if "train_seconds" in results:
        rows.append(["Training, without evaluation", duration(results["train_seconds"])])
    for key, name in (
        ("extraction_seconds", "Extracting features, all times"),
        ("clustering_seconds", "Clustering, all times"),
    ):
        if run.curve(key).values:
            rows.append([name, duration(sum(run.curve(key).values))])
    for key, name in (
        ("peak_memory_mib", "Peak memory"),
        ("peak_gpu_memory_mib", "Peak GPU memory"),
    ):
        if results.get(key):
            rows.append([name, f"{results[key]:,.0f} MiB"])
    versions = results.get("versions")
    if isinstance(versions, Mapping):
        rows += [[f"Version of {name}", str(value)] for name, value in versions.items()]
    for name, metrics in run.metrics.items():
        rows += [
            [f"{metric}, {name}", f"{value:.2f} %"]
            for metric, value in metrics.items()
            if isinstance(value, (int, float))
        ]
    return table(["What", "Value"], rows)

"""Image files of results: ranked lists, contact sheets of clusters and the loss curve.

The functions depend on no host and need no display.

Shape shorthand in this module:

    Q: query images
    G: gallery images
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from selcon_plugin.installing import pip_install
from selcon_plugin.io.atomic import make_folder, replacing
from selcon_plugin.io.own_output import SHEET_MARK
from selcon_plugin.runs.metrics import read_metrics
from selcon_plugin.runs.ranked import LabeledImages, rank_gallery
from selcon_plugin.runs.sheets import (
    BACKGROUND,
    FRAME,
    FRAME_COLOR,
    GAP,
    LINE,
    TEXT_COLOR,
    SheetRow,
    draw_sheet,
    framed_thumbnail,
    sheet_font,
)

__all__ = [
    "LabeledImages",
    "SheetRow",
    "contact_sheet",
    "loss_curve",
    "rank_gallery",
    "ranked_sheet",
    "read_metrics",
]

RIGHT_COLOR = (22, 163, 74)
WRONG_COLOR = (220, 38, 38)
QUERY_COLOR = FRAME_COLOR
_QUERY_GAP = 16  # between the query and its results, in pixels


def ranked_sheet(
    path: str | Path,
    query: LabeledImages,
    gallery: LabeledImages,
    distances: Mapping[str, ArrayLike],
    *,
    queries: Sequence[int],
    top: int = 10,
    image_size: tuple[int, int] = (64, 128),
) -> Path:
    """Draw the ranked results of some queries for one or several models.

    Each query has one row per model. A row shows the query in a gray frame at the left,
    followed by its nearest gallery images, right ones in a green frame and wrong ones in a
    red frame. Images that the protocol ignores are left out, see :func:`rank_gallery`.

    Args:
        path: PNG or JPEG file to write; its folder is created if missing.
        query: The Q queries.
        gallery: The G gallery images.
        distances: Distances of shape ``(Q, G)`` by the name of the model, which labels its
            rows.
        queries: Indices of the queries to show.
        top: Results per row, or fewer if the gallery is smaller.
        image_size: Width and height of each image in pixels.

    Returns:
        The file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (64, 128)).save(folder / "person.png")
        >>> person = str(folder / "person.png")
        >>> query = LabeledImages([person], np.array([1]), np.array([1]))
        >>> gallery = LabeledImages([person], np.array([1]), np.array([2]))
        >>> ranked_sheet(
        ...     folder / "sheet.png", query, gallery, {"model": [[0.5]]}, queries=[0]
        ... ).name
        'sheet.png'
    """
    tables = {name: np.asarray(table) for name, table in distances.items()}
    _check_sheet(query, gallery, tables, queries)
    font = sheet_font()
    label_width = 2 * GAP + max(math.ceil(font.getlength(name)) for name in tables)
    cell = (image_size[0] + 2 * FRAME, image_size[1] + 2 * FRAME)
    columns = min(top, len(gallery))
    left = label_width + cell[0] + _QUERY_GAP  # of the first result
    block_height = LINE + len(tables) * (cell[1] + GAP) + GAP
    sheet = Image.new(
        "RGB",
        (left + columns * (cell[0] + GAP), len(queries) * block_height + GAP),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    y = GAP
    for number in queries:
        pid, camid = int(query.pids[number]), int(query.camids[number])
        title = f"person {pid}: {Path(query.paths[number]).name}"
        draw.text((label_width, y), title, fill=TEXT_COLOR, font=font)
        y += LINE
        for name, table in tables.items():
            draw.text((GAP, y + cell[1] // 2 - LINE // 2), name, TEXT_COLOR, font)
            query_image = framed_thumbnail(query.paths[number], image_size, QUERY_COLOR)
            sheet.paste(query_image, (label_width, y))
            ranked = rank_gallery(table[number], pid, camid, gallery, top=top)
            for column, match in enumerate(ranked):
                color = RIGHT_COLOR if gallery.pids[match] == pid else WRONG_COLOR
                image = framed_thumbnail(gallery.paths[match], image_size, color)
                sheet.paste(image, (left + column * (cell[0] + GAP), y))
            y += cell[1] + GAP
        y += GAP
    return _save(sheet, path)


def _check_sheet(
    query: LabeledImages,
    gallery: LabeledImages,
    tables: Mapping[str, NDArray[Any]],
    queries: Sequence[int],
) -> None:
    if not tables:
        raise ValueError("distances is empty: give the distances of at least one model")
    if not queries:
        raise ValueError("queries is empty: give the indices of the queries to show")
    if not len(gallery):
        raise ValueError("the gallery is empty")
    for name, table in tables.items():
        if table.shape != (len(query), len(gallery)):
            raise ValueError(
                f"distances[{name!r}] must have shape ({len(query)}, {len(gallery)}), "
                f"queries by gallery images, got {table.shape}"
            )
    for number in queries:
        if not 0 <= number < len(query):
            raise ValueError(f"there are queries 0 to {len(query) - 1}, but not {number}")


def contact_sheet(
    path: str | Path,
    rows: Sequence[SheetRow],
    *,
    columns: int = 12,
    image_size: tuple[int, int] = (64, 128),
) -> Path:
    """Draw a contact sheet with one row per group of images.

    A group with more images than columns is sampled evenly, including its first and its
    last image. An unreadable image is gray.

    Args:
        path: PNG or JPEG file to write; its folder is created if missing.
        rows: The groups.
        columns: Maximum number of images per row, at least 2.
        image_size: Width and height of each image in pixels.

    Returns:
        The file.

    Raises:
        ValueError: If there are no rows, or fewer than 2 columns.
    """  # noqa: DOC502  (raised by the functions called here)
    sheet = draw_sheet(rows, columns=columns, image_size=image_size)
    return _save(sheet, path)


def _save(sheet: Image.Image, path: str | Path) -> Path:
    path = Path(path)
    make_folder(path.parent)
    sheet_format = Image.registered_extensions().get(path.suffix.lower())
    if sheet_format is None:
        raise ValueError(f"{path} must end with .png, .jpg or another suffix of images")
    # A sheet inside a folder of images is not taken for one of them.
    mark = SHEET_MARK.decode()
    text = PngInfo()
    text.add_text("Comment", mark)
    with replacing(path) as stream:
        sheet.save(stream, sheet_format, comment=mark, pnginfo=text)
    return path


def loss_curve(
    metrics: str | Path,
    path: str | Path,
    *,
    steps_per_epoch: int | None = None,
    warmup_steps: int = 0,
) -> Path:
    """Draw the training loss and, if it was measured, the neighbor precision.

    Args:
        metrics: ``metrics.json`` of a run, see :func:`read_metrics`.
        path: PNG, SVG or PDF file to write; its folder is created if missing.
        steps_per_epoch: If given, the axis shows epochs instead of training steps.
        warmup_steps: Number of warm-up steps. Their loss is computed against other images
            and is not comparable with the later one, so it is a separate line on gray.

    Returns:
        The file.

    Raises:
        ValueError: If the metrics contain no finite loss.
        ImportError: If matplotlib is missing.
    """
    records = read_metrics(metrics)
    steps, losses = _series(records, "total_loss")
    if not steps:
        raise ValueError(f"{metrics} contains no total_loss to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            f"the loss curve needs matplotlib: {pip_install('matplotlib')}"
        ) from error
    # Without pyplot, which would need a display and keep the plot in memory.
    plot = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasAgg(plot)
    axes = plot.add_subplot()
    scale = 1.0 / steps_per_epoch if steps_per_epoch else 1.0
    num_warmup = sum(step <= warmup_steps for step in steps)
    for part in (slice(num_warmup), slice(num_warmup, None)):
        axes.plot(_scaled(steps[part], scale), losses[part], marker=".", color="tab:blue")
    if num_warmup:
        axes.axvspan(
            0.0, warmup_steps * scale, color="tab:gray", alpha=0.2, label="warm-up"
        )
        axes.legend(loc="upper center")
    axes.set_xlim(left=0.0)
    axes.set_xlabel("epoch" if steps_per_epoch else "training step")
    axes.set_ylabel("loss", color="tab:blue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    precision_steps, precisions = _series(records, "neighbor_precision")
    if precision_steps:
        right = axes.twinx()
        percent = [100.0 * value for value in precisions]
        right.plot(_scaled(precision_steps, scale), percent, marker=".", color="tab:green")
        right.set_ylabel("neighbor precision, %", color="tab:green")
        right.set_ylim(0.0, 100.0)
    path = Path(path)
    make_folder(path.parent)
    with replacing(path) as stream:
        plot.savefig(stream, dpi=120, format=path.suffix.lstrip(".") or "png")
    return path


def _series(records: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps, counted from 1, and values of the finite records of a metric."""
    found = [
        (record["iteration"] + 1, float(record[key]))
        for record in records
        if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])
    ]
    return [step for step, _ in found], [value for _, value in found]


def _scaled(steps: list[float], scale: float) -> list[float]:
    return [step * scale for step in steps]

"""Results of a search as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from selcon_plugin.datasets.reading import ImageReadError, read_rgb
from selcon_plugin.io.atomic import make_folder, write_atomically
from selcon_plugin.io.output_files import PAGES, check_output_file
from selcon_plugin.report.document import Picture, Section, render_page
from selcon_plugin.retrieval.results import Match, QueryResult

_THUMBNAIL = (96, 192)  # width and height at most
_QUALITY = 80


@dataclass(frozen=True)
class _Match:
    """A result of a query; no picture if none are shown."""

    picture: Picture | None
    cosine: str
    camera: str | None
    path: str


@dataclass(frozen=True)
class _Query:
    """A query and its results, the best first, or the nearest below the threshold."""

    picture: Picture | None
    path: str
    matches: Sequence[_Match]
    below: Sequence[_Match]


def write_page(
    file: str | Path,
    results: Sequence[QueryResult],
    *,
    summary: str = "",
    show_images: bool = True,
) -> None:
    """Write the results of a search to an HTML file.

    Args:
        file: File to write or replace; its folder is created.
        results: Result of :func:`selcon_plugin.retrieval.search`.
        summary: Sentence at the top, such as the index and the threshold.
        show_images: Whether to embed thumbnails of the images; otherwise the page contains
            only paths.

    Raises:
        ValueError: If an existing file of this name is not a page.
    """  # noqa: DOC502  (raised by the functions called here)
    check_output_file(file, name="file", kinds=PAGES)
    title = (
        f"Search results of {len(results)} {'query' if len(results) == 1 else 'queries'}"
    )
    page = render_page(
        "search.html.j2",
        title=title,
        heading=title,
        subtitle=summary,
        sections=[
            Section(f"query-{number}", Path(result.query).name, _query(result, show_images))
            for number, result in enumerate(results, start=1)
        ],
    )
    make_folder(Path(file).parent)
    write_atomically(page, file)


def _query(result: QueryResult, show_images: bool) -> _Query:
    picture = _thumbnail(result.query, "the query", show_images)
    matches = _matches(result.matches, "result", show_images)
    below = _matches(result.below, "below the threshold", show_images)
    return _Query(picture, result.query, matches, below)


def _matches(matches: Sequence[Match], text: str, show_images: bool) -> list[_Match]:
    return [
        _Match(
            _thumbnail(match.path, f"{text} {rank}", show_images),
            f"{match.similarity:.3f}",
            match.camera,
            match.path,
        )
        for rank, match in enumerate(matches, start=1)
    ]


def _thumbnail(path: str, text: str, show: bool) -> Picture | None:
    """Read a thumbnail; without a URI if the file cannot be read."""
    if not show:
        return None
    try:
        image = read_rgb(path)
    except ImageReadError:
        return Picture("", text)
    image.thumbnail(_THUMBNAIL, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    data = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/jpeg;base64,{data}", text, image.width, image.height)

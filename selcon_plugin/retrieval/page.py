"""What a search found, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from selcon_plugin.datasets.reading import ImageReadError, read_rgb
from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.retrieval.results import Match, QueryResult

_THUMBNAIL = (96, 192)  # width and height at most
_QUALITY = 80

# Nothing may be loaded from anywhere: pictures are in the file.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #767676; --link: light-dark(#005a9c, #8cc8ff); }}
body {{ font: 1rem/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 75rem;
  padding: 1rem; }}
h1 {{ font-size: 1.4rem; }}
h2 {{ font-size: 1.1rem; overflow-wrap: anywhere; }}
section {{ border-top: 1px solid var(--line); padding: .5rem 0 1rem; }}
a {{ color: var(--link); }}
ol {{ display: grid; gap: .75rem; list-style: none; margin: 0; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }}
.query {{ margin: 0 0 1rem; }}
img {{ background: #8884; display: block; height: 12rem; object-fit: contain;
  width: 6rem; }}
.cosine {{ font-variant-numeric: tabular-nums; font-weight: 600; }}
.path {{ display: block; font-size: .8rem; overflow-wrap: anywhere; }}
.skip:not(:focus) {{ left: -999rem; position: absolute; }}
@media print {{ body {{ max-width: none; }} li, .query {{ break-inside: avoid; }} }}
</style>
</head>
<body>
<a class="skip" href="#results">Skip to the results</a>
<header>
<h1>{title}</h1>
<p>{summary}</p>
</header>
<main id="results">
{sections}
</main>
</body>
</html>
"""


def write_page(
    file: str | Path,
    results: Sequence[QueryResult],
    *,
    summary: str = "",
    show_images: bool = True,
) -> None:
    """Write what was found to an HTML file.

    Args:
        file: The file to write or replace; its folder is made.
        results: What :func:`selcon_plugin.retrieval.search` returned.
        summary: A sentence on top, such as the index and the threshold.
        show_images: Whether pictures are put in, as thumbnails; else only their paths.
    """
    queries = f"{len(results)} {'query' if len(results) == 1 else 'queries'}"
    page = _PAGE.format(
        title=f"Search results of {queries}",
        summary=html.escape(summary),
        sections="\n".join(
            _section(number, result, show_images)
            for number, result in enumerate(results, start=1)
        ),
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    # A file name that is no text would be no UTF-8 either.
    write_atomically(page.encode("utf-8", "replace").decode(), file)


def _section(number: int, result: QueryResult, show_images: bool) -> str:
    name = html.escape(Path(result.query).name)
    picture = _picture(result.query, "the query", show_images)
    items = "\n".join(
        _item(rank, match, show_images) for rank, match in enumerate(result.matches, 1)
    )
    found = f"<ol>\n{items}\n</ol>" if items else "<p>Nothing was found.</p>"
    return (
        f'<section aria-labelledby="query-{number}">\n'
        f'<h2 id="query-{number}">{name}</h2>\n'
        f'<div class="query">{picture}<span class="path">{html.escape(result.query)}</span>'
        f"</div>\n{found}\n</section>"
    )


def _item(rank: int, match: Match, show_images: bool) -> str:
    camera = f", camera {html.escape(match.camera)}" if match.camera is not None else ""
    picture = _picture(match.path, f"result {rank}", show_images)
    return (
        f'<li>{picture}<span class="cosine">{rank}. {match.similarity:.3f}</span>{camera}'
        f'<span class="path">{html.escape(match.path)}</span></li>'
    )


def _picture(path: str, description: str, show: bool) -> str:
    if not show:
        return ""
    try:
        image = read_rgb(path)
    except ImageReadError:
        return "<p>(the image cannot be read now)</p>"
    image.thumbnail(_THUMBNAIL, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" '
        f'height="{image.height}" alt="{description}" loading="lazy">'
    )

"""A page as plain data, and the Jinja templates that turn it into HTML.

The templates escape every value. Only drawings are ``Markup``: SVG whose text was escaped
by the code that drew it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: Its id; the template knows by it how the content is shown.
        title: Its heading.
        content: Data for the template. A section without content is left out.
    """

    anchor: str
    title: str
    content: Any


@dataclass(frozen=True)
class Table:
    """A table of plain text, whose first column holds the headings of the rows.

    Attributes:
        head: Headings of the columns.
        rows: Cells.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture, or the text that replaces it.

    Attributes:
        uri: The picture as a ``data:`` URI; empty if it is not shown.
        text: What the picture shows.
        width: Width in pixels.
        height: Height in pixels.
    """

    uri: str
    text: str
    width: int = 64
    height: int = 128


@dataclass(frozen=True)
class Cell:
    """A picture of a strip.

    Attributes:
        picture: The picture.
        caption: Text below it; may be empty.
        kind: ``"query"``, ``"hit"``, ``"miss"`` or empty.
    """

    picture: Picture
    caption: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Strip:
    """A row of pictures that belong together.

    Attributes:
        title: Text above the pictures.
        cells: The pictures.
    """

    title: str
    cells: Sequence[Cell]


def render_page(
    template: str, *, title: str, heading: str, subtitle: str, sections: Sequence[Section]
) -> str:
    """Render a page.

    Args:
        template: Name of the template, which extends ``base.html.j2``.
        title: Title of the window.
        heading: Heading of the page.
        subtitle: Text below the heading.
        sections: Sections in order; those without content are left out.

    Returns:
        A complete HTML document, with style and script inside.
    """
    text = (
        _environment()
        .get_template(template)
        .render(
            title=title,
            heading=heading,
            subtitle=subtitle,
            sections=[section for section in sections if section.content],
        )
    )
    # A file name can hold bytes that are not text: UTF-8 cannot express them.
    return text.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("selcon_plugin.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.globals["asset"] = lambda name: Markup(
        loader.get_source(environment, name)[0]  # a file of this package, not of a user
    )
    return environment

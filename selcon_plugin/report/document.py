"""The data classes of a page, and its rendering to HTML with Jinja templates.

The templates escape every value except drawings. Drawings are ``Markup``: SVG whose text
was escaped by the code that drew it.
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
    """A section of a page.

    Attributes:
        anchor: HTML id, by which the template selects how to render the content.
        title: Heading.
        content: Data for the template. A section without content is left out.
    """

    anchor: str
    title: str
    content: Any


@dataclass(frozen=True)
class Table:
    """A table of plain text with the headings of the rows in its first column.

    Attributes:
        head: Headings of the columns.
        rows: Cells of each row.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An image, or the text that replaces it.

    Attributes:
        uri: The image as a ``data:`` URI; empty if it is not shown.
        text: Text alternative of the image.
        width: Width in pixels.
        height: Height in pixels.
    """

    uri: str
    text: str
    width: int = 64
    height: int = 128


@dataclass(frozen=True)
class Cell:
    """An image of a strip with its caption.

    Attributes:
        picture: The image.
        caption: Text below the image; may be empty.
        kind: ``"query"``, ``"hit"``, ``"miss"`` or empty.
    """

    picture: Picture
    caption: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Strip:
    """A titled row of related images.

    Attributes:
        title: Text above the images.
        cells: The images.
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
        A complete HTML document with embedded style sheet and script.
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
    # A file name can contain bytes that are not valid text, which UTF-8 cannot encode.
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
        loader.get_source(environment, name)[0]  # a file of this package, not the user's
    )
    return environment

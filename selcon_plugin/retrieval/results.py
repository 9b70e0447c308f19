"""Results of adding images to an index and of searching in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Added:
    """What adding a folder did.

    Attributes:
        new: Images that were not in the index.
        changed: Images whose file had changed, and whose feature was replaced.
        known: Images that were in the index already.
        unreadable: Path and reason of each file that cannot be read.
    """

    new: int
    changed: int
    known: int
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """An image that was found.

    Attributes:
        path: Its file.
        similarity: Cosine with the query.
        camera: Name of its camera; None where unknown.
    """

    path: str
    similarity: float
    camera: str | None


@dataclass(frozen=True)
class QueryResult:
    """What was found for a query.

    Attributes:
        query: Its file.
        matches: The images, most similar first.
    """

    query: str
    matches: tuple[Match, ...]

"""Results of adding images to an index and of searching in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Added:
    """Result of adding a folder to an index.

    Attributes:
        new: Number of images that were not in the index.
        changed: Number of images whose file has changed and whose feature was replaced.
        known: Number of images that were in the index already.
        unreadable: Path and reason of each unreadable file.
    """

    new: int
    changed: int
    known: int
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """Image in the results of a query.

    Attributes:
        path: Path of the image.
        similarity: Cosine similarity with the query.
        camera: Name of the camera; None where unknown.
    """

    path: str
    similarity: float
    camera: str | None


@dataclass(frozen=True)
class QueryResult:
    """Results of one query.

    Attributes:
        query: Path of the query image.
        matches: Retrieved images, most similar first.
    """

    query: str
    matches: tuple[Match, ...]

"""Results of adding images to an index and of searching in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Added:
    """Result of adding a folder to an index, or of updating it.

    Attributes:
        new: Number of images that were not in the index.
        changed: Number of images whose content has changed and whose feature was replaced.
        known: Number of images that were in the index already, as they are.
        unreadable: Path and reason of each unreadable file.
        removed: Number of images that were removed because their files are gone or can no
            longer be read.
        moved: Number of files that have another path, and whose feature was kept.
        relabeled: Number of images of which only the camera has changed.
        repaired: Number of images whose features on disk were damaged; they are counted
            as new, or as removed if their files do not lie in the folder.
    """

    new: int
    changed: int
    known: int
    unreadable: tuple[str, ...]
    removed: int = 0
    moved: int = 0
    relabeled: int = 0
    repaired: int = 0

    def __str__(self) -> str:
        parts = {
            "with another content": self.changed,
            "with another camera": self.relabeled,
            "moved": self.moved,
        }
        details = ", ".join(f"{count} {name}" for name, count in parts.items() if count)
        updated = self.changed + self.relabeled + self.moved
        return (
            f"{self.new} images added, {updated} updated{f' ({details})' * bool(details)}, "
            f"{self.removed} removed, {self.known} unchanged"
        )


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
        query: Path of the query image; ``"query 1"`` and so on for images in memory.
        matches: Retrieved images, most similar first.
        below: Nearest images, all below the threshold, if no image reaches it; otherwise
            empty.
    """

    query: str
    matches: tuple[Match, ...]
    below: tuple[Match, ...] = ()

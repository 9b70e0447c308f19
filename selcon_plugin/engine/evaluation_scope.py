"""Scope of the metrics of a test set: which queries count, and how far the ranks go."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationScope:
    """Scope of the metrics of a test set by Market-1501's protocol.

    A query is not compared with the images of its own identity and camera, and a query
    without another image of its identity is left out.

    Attributes:
        name: Name of the test set.
        num_queries: Number of queries.
        num_matched: Queries with a match in the gallery.
        num_images: Smallest number of gallery images that such a query is compared with.
        num_persons: Number of persons in the gallery.
    """

    name: str
    num_queries: int
    num_matched: int
    num_images: int
    num_persons: int

    @classmethod
    def of(
        cls,
        name: str,
        test_set: Mapping[str, Any],
        *,
        remedy: str = "Name another test set, or none",
    ) -> EvaluationScope:
        """Measure a test set.

        Args:
            name: Name of the test set.
            test_set: Entries ``query`` and ``gallery`` with path, identity and camera of
                each image.
            remedy: How to choose another test set, for the error message.

        Returns:
            The scope.

        Raises:
            ValueError: If no query has a match.
        """
        gallery = [(pid, camid) for _, pid, camid, *_ in test_set["gallery"]]
        same, persons = Counter(gallery), Counter(pid for pid, _ in gallery)
        queries = [(pid, camid) for _, pid, camid, *_ in test_set["query"]]
        own = [same[query] for query in queries if persons[query[0]] > same[query]]
        if not own:
            raise ValueError(
                f"the test set {name} measures nothing: none of its {len(queries)} queries "
                f"has an image of the same person from another camera among the "
                f"{len(gallery)} gallery images. {remedy}"
            )
        return cls(name, len(queries), len(own), len(gallery) - max(own), len(persons))

    def last_rank(self, by_person: bool) -> int:
        """Return the last rank that every query has.

        Args:
            by_person: Whether one image of each person is ranked (CUHK03's metric).
        """
        return self.num_persons if by_person else self.num_images

    def report(self) -> None:
        """Log how many queries are left out, if there are any."""
        if self.num_matched < self.num_queries:
            logger.warning(
                "%d of the %d queries of %s have no match from another camera in the "
                "gallery: the metrics are those of the other %d",
                self.num_queries - self.num_matched,
                self.num_queries,
                self.name,
                self.num_matched,
            )

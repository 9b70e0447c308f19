"""Guards around torchreid's evaluation of small galleries."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from selcon_plugin.compat.torchreid import import_torchreid

logger = logging.getLogger(__name__)


def _smallest_gallery(test_set: Mapping[str, Any]) -> int:
    """Return the gallery images of a query, at least: all but its own on its camera."""
    seen = Counter((pid, camid) for _, pid, camid, *_ in test_set["gallery"])
    own = max(seen[pid, camid] for _, pid, camid, *_ in test_set["query"])
    return len(test_set["gallery"]) - own


@contextlib.contextmanager
def _ranks_up_to(last: int, record: Callable[[Any], None]) -> Iterator[None]:
    """Let torchreid count matches at those ranks alone that every query has.

    Args:
        last: The last such rank.
        record: Is handed the distances; the evaluation goes on where it fails.
    """
    metrics = import_torchreid().metrics
    evaluate = metrics.evaluate_rank

    def bounded(*args: Any, max_rank: int = 50, **kwargs: Any) -> Any:
        try:
            record(args[0])
        except Exception as error:
            logger.warning("Ranked results could not be kept: %s", error)
        return evaluate(*args, max_rank=max(1, min(max_rank, last)), **kwargs)

    metrics.evaluate_rank = bounded
    try:
        yield
    finally:
        metrics.evaluate_rank = evaluate

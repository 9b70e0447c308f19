"""Search for the persons of query images in an index."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selcon_plugin.datasets.reading import as_rgb, describe_faults
from selcon_plugin.features import check_features
from selcon_plugin.inference.arguments import check_cosine, check_list
from selcon_plugin.retrieval.index import Index
from selcon_plugin.retrieval.results import QueryResult
from selcon_plugin.retrieval.source import ImageEmbedder

logger = logging.getLogger(__name__)

_NUM_BELOW = 3  # nearest images that are shown if none reaches the threshold

_Query = str | Path | bytes | Image.Image | NDArray[np.uint8]


def search(
    index: Index | str | Path,
    queries: Iterable[_Query],
    *,
    embedder: ImageEmbedder | None = None,
    top: int = 10,
    camera: Sequence[str] = (),
    not_camera: Sequence[str] = (),
    threshold: float = -1.0,
    center_cameras: bool = False,
    query_camera: str | None = None,
) -> list[QueryResult]:
    """Find the persons of query images in an index.

    Args:
        index: Index, or its folder.
        queries: List of image files, or of images in another form that
            ``selcon_plugin.datasets.reading.as_rgb`` takes. A file that is in the index is
            not one of its own results.
        embedder: Network of the index; None to load it from the source that the index
            names.
        top: Maximum number of results per query.
        camera: Cameras to search; empty for all.
        not_camera: Cameras to exclude.
        threshold: Smallest cosine of a result.
        center_cameras: Whether to center the features of index and queries per camera, as
            :meth:`Index.search` does. A query that is in the index has its camera there.
        query_camera: Camera of queries that are not in the index. If None, a warning
            states how many queries are not centered.

    Returns:
        The results of each query, most similar first, or the three nearest images below
        the threshold if none reaches it. A warning lists the results whose files are gone
        since they were added.

    Raises:
        BadFeaturesError: If the network does not return a unit vector per query.
        ValueError: If the network is not that of the index, or an argument is invalid.
        FileNotFoundError: If there is no index, or its network is missing.
        ImageReadError: If a query is unreadable.
    """  # noqa: DOC502  (raised by the functions called here)
    if not isinstance(index, Index):
        index = Index.open(index)
    asked = check_list("queries", queries, one="query")
    files = [os.fsdecode(q) if isinstance(q, (str, os.PathLike)) else "" for q in asked]
    images = [as_rgb(query) for query in asked]
    if embedder is None:
        if index.source is None:
            raise ValueError("the index does not name its network: pass embedder")
        embedder = index.source.load()
    index.check_network(embedder)
    features: Any = np.zeros((0, index.dim), dtype=np.float32)
    if images:
        features = check_features(
            embedder(images),
            source="the network's output for the queries",
            rows=len(images),
            dim=index.dim,
        )
    threshold = check_cosine("threshold", threshold)
    cameras = _query_cameras(index, files, query_camera) if center_cameras else []
    found = index.search(
        features,
        top=top,
        camera=camera,
        not_camera=not_camera,
        leave_out=files,
        center_cameras=center_cameras,
        query_cameras=cameras,
    )
    results = []
    for number, (file, nearest) in enumerate(zip(files, found, strict=True), start=1):
        matches = tuple(match for match in nearest if match.similarity >= threshold)
        below = () if matches else nearest[:_NUM_BELOW]
        results.append(QueryResult(file or f"query {number}", matches, below))
    _warn_of_missing_files(results)
    return results


def _query_cameras(
    index: Index, files: Sequence[str], query_camera: str | None
) -> list[str | None]:
    """Return the camera of each query: that of the index, else the given one."""
    cameras = [camera or query_camera for camera in index.cameras_of(files)]
    if unknown := cameras.count(None):
        logger.warning(
            "%d of %d queries are not in the index and of unknown camera: their features "
            "are not centered. Give query_camera if all are of one camera",
            *(unknown, len(cameras)),
        )
    return cameras


def _warn_of_missing_files(results: Sequence[QueryResult]) -> None:
    paths = dict.fromkeys(
        match.path for result in results for match in (*result.matches, *result.below)
    )
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        logger.warning(
            "The files of %d results are gone since they were added to the index; run "
            "selcon index on their folders again:\n%s",
            len(missing),
            describe_faults(missing),
        )

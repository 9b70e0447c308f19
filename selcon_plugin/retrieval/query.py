"""Search for the persons of query images in an index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.retrieval.index import Index
from selcon_plugin.retrieval.results import QueryResult
from selcon_plugin.retrieval.source import ImageEmbedder


def search(
    index: Index | str | Path,
    queries: Sequence[str | Path],
    *,
    embedder: ImageEmbedder | None = None,
    top: int = 10,
    camera: Sequence[str] = (),
    not_camera: Sequence[str] = (),
    threshold: float = -1.0,
) -> list[QueryResult]:
    """Find the persons of query images in an index.

    Args:
        index: Index, or its folder.
        queries: Image files. A query that is in the index is not one of its own results.
        embedder: Network of the index; None to load it from the source that the index
            names.
        top: Maximum number of results per query.
        camera: Cameras to search; empty for all.
        not_camera: Cameras to exclude.
        threshold: Smallest cosine of a result.

    Returns:
        The results of each query, most similar first.

    Raises:
        ValueError: If the network is not that of the index, or an argument is invalid.
        FileNotFoundError: If there is no index, or its network is missing.
        ImageReadError: If a query is unreadable.
    """  # noqa: DOC502  (raised by the functions called here)
    if not isinstance(index, Index):
        index = Index.open(index)
    files = [os.fspath(query) for query in queries]
    images = [read_rgb(file) for file in files]
    if embedder is None:
        if index.source is None:
            raise ValueError("the index does not name its network: pass embedder")
        embedder = index.source.load()
    index.check_network(embedder)
    found = index.search(
        np.asarray(embedder(images), dtype=np.float32).reshape(len(files), index.dim),
        top=top,
        camera=camera,
        not_camera=not_camera,
        threshold=threshold,
        leave_out=files,
    )
    return [QueryResult(file, matches) for file, matches in zip(files, found, strict=True)]

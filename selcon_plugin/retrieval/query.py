"""``search``: find the persons of query images in an index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.retrieval.index import Index
from selcon_plugin.retrieval.results import QueryResult
from selcon_plugin.retrieval.source import (
    ImageEmbedder,
)


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
    """Find the persons of some images in an index.

    Args:
        index: The index, or its folder.
        queries: Image files. One that is in the index is not found by itself.
        embedder: The network of the index; read from where the index says if None.
        top: Images per query.
        camera: Look only among these cameras; all if empty.
        not_camera: Do not look among these.
        threshold: Leave out what is less similar.

    Returns:
        For each query what was found, most similar first.

    Raises:
        ValueError: If the network is not that of the index, or an argument is wrong.
        FileNotFoundError: If there is no index, or its network is gone.
        ImageReadError: If a query cannot be read.
    """  # noqa: DOC502  (raised by what this calls)
    if not isinstance(index, Index):
        index = Index.open(index)
    files = [os.fspath(query) for query in queries]
    images = [read_rgb(file) for file in files]
    if embedder is None:
        if index.source is None:
            raise ValueError("the index does not say where its network is: give embedder")
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

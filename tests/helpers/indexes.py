"""Indexes of given features, as if images had been read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selcon_plugin.retrieval import Index
from selcon_plugin.retrieval.store import IndexedImage


def unit(rows: ArrayLike) -> NDArray[np.float32]:
    """Return rows of length 1."""
    values = np.asarray(rows)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    result: NDArray[np.float32] = (values / lengths).astype(np.float32)
    return result


class OfDim:
    """An embedder of any length, for indexes that are filled by hand."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, images: Sequence[Any], *, batch_size: int = 64) -> NDArray[Any]:
        return unit(np.random.default_rng(0).normal(size=(len(images), self.dim)))


def filled(
    folder: Path,
    features: NDArray[np.float32],
    *,
    cameras: Sequence[str | None] | None = None,
    **options: Any,
) -> Index:
    """Make an index of features, whose images are ``/crops/0.jpg`` and so on."""
    index = Index.create(folder, OfDim(features.shape[1]), **options)
    images = [
        IndexedImage(f"/crops/{row}.jpg", cameras[row] if cameras else None, 1, 1)
        for row in range(len(features))
    ]
    with index._store.writing():
        index._store.append(features, images)
        index._maintain()
    return index

"""Jaccard distance for any images: none, one, duplicates, zero vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selcon_plugin.clustering import dbscan_labels, jaccard_distance
from selcon_plugin.clustering.jaccard import ROUNDING, ZERO
from selcon_plugin.clustering.knn import nearest_neighbors

BACKENDS = ("numba", "torch")
widths = st.integers(1, 12)


@st.composite
def image_features(draw: Any, *, duplicates: bool = True) -> Tensor:
    count, dim = draw(st.integers(0, 24)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    if duplicates and count and draw(st.booleans()):
        features = features[torch.randint(count, (count,), generator=generator)]
    if duplicates and count and draw(st.booleans()):
        features[0] = 0.0
    return features


def dense(distance: Any) -> Any:
    """Return all pairs: 1 for missing entries, 0 for distances of 0 up to rounding."""
    full = np.ones(distance.shape)
    entries = distance.tocoo()
    full[entries.row, entries.col] = np.where(entries.data <= ROUNDING, 0, entries.data)
    return full


@given(image_features(), widths, widths)
def test_distances_are_symmetric_in_range_and_zero_to_oneself(
    features: Tensor, k1: int, k2: int
) -> None:
    found = jaccard_distance(features, k1=k1, k2=k2)
    count = len(features)
    assert found.shape == (count, count)
    assert found.has_sorted_indices
    assert ((found.data >= np.float32(ZERO)) & (found.data < 1)).all()
    full = dense(found)
    np.testing.assert_allclose(full, full.T, rtol=0, atol=1e-6)
    assert (found.diagonal() == np.float32(ZERO)).all()


@given(image_features(), widths, widths, st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]))
def test_backends_agree(
    features: Tensor, k1: int, k2: int, max_distance: float | None
) -> None:
    neighbors = nearest_neighbors(features, k1) if len(features) else None
    options = {"k1": k1, "k2": k2, "max_distance": max_distance, "neighbors": neighbors}
    first, second = (
        jaccard_distance(features, backend=name, **options)  # type: ignore[arg-type]
        for name in BACKENDS
    )
    limit = 1.0 if max_distance is None else max_distance
    gap = np.abs(dense(first) - dense(second))
    # A distance at the limit may round to either side of it.
    at_limit = (np.abs(dense(first) - limit) < 1e-5) | (
        np.abs(dense(second) - limit) < 1e-5
    )
    assert (gap[~at_limit] < 1e-5).all()


@given(image_features(duplicates=False), widths, widths, st.integers(0, 99))
def test_order_of_the_images_does_not_matter(
    features: Tensor, k1: int, k2: int, seed: int
) -> None:
    if features.shape[1] == 1:  # all are duplicates, which are ranked by their number
        return
    order = np.random.default_rng(seed).permutation(len(features))
    found = dense(jaccard_distance(features, k1=k1, k2=k2))
    permuted = dense(jaccard_distance(features[order], k1=k1, k2=k2))
    np.testing.assert_allclose(permuted, found[order][:, order], rtol=0, atol=1e-5)


@given(image_features(), widths, st.floats(0.01, 1.0))
def test_limit_leaves_out_what_lies_beyond(
    features: Tensor, k1: int, max_distance: float
) -> None:
    whole = dense(jaccard_distance(features, k1=k1))
    kept = dense(jaccard_distance(features, k1=k1, max_distance=max_distance))
    assert (kept[whole <= max_distance - 1e-5] < 1).all()
    assert (kept[whole > max_distance + 1e-5] == 1).all()


@given(image_features(), widths, st.integers(1, 5), st.floats(0.05, 0.95))
def test_dbscan_labels_are_numbered_without_gaps(
    features: Tensor, k1: int, min_samples: int, eps: float
) -> None:
    distance = jaccard_distance(features, k1=k1, max_distance=eps)
    labels = np.asarray(dbscan_labels(distance, eps=eps, min_samples=min_samples))
    assert labels.shape == (len(features),)
    names = sorted(set(labels.tolist()) - {-1})
    assert names == list(range(len(names)))
    if min_samples == 1:
        assert (labels >= 0).all()

"""Multi-scale Jaccard distance: the mean of its definition, and the half-whitening."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.clustering.jaccard import jaccard_distance
from selcon_plugin.clustering.multi_scale import (
    half_whitened,
    multi_scale_distance,
    without_mean,
)


def unit(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2, columns)
    return F.normalize(torch.randn(rows, columns, generator=generator) * scale + 1, dim=1)


def dense(sparse) -> np.ndarray:
    found = 1 - sparse.toarray()
    stored = np.zeros(sparse.shape, dtype=bool)
    stored[sparse.nonzero()] = True
    return np.where(stored, 1 - found, 1.0)


def test_distance_is_the_mean_over_three_sizes() -> None:
    features = unit(90, 24)
    whitened = half_whitened(features)
    sizes = ((4, 1), (9, 2), (20, 4))
    parts = [dense(jaccard_distance(whitened, k1=k1, k2=k2)) for k1, k2 in sizes]
    found = multi_scale_distance(features)
    np.testing.assert_allclose(dense(found), np.mean(parts, axis=0), atol=2e-6)
    assert (found != found.T).nnz == 0
    assert found.dtype == np.float32
    assert (found.diagonal() > 0).all()


@pytest.mark.parametrize("num_images", [0, 1, 2, 5])
def test_few_images(num_images: int) -> None:
    assert multi_scale_distance(unit(num_images, 8)).shape == (num_images, num_images)


def test_copies_are_close() -> None:
    features = torch.cat([unit(30, 16), unit(1, 16, seed=1).expand(25, 16)])
    found = dense(multi_scale_distance(features))
    assert found[30:, 30:].max() < 0.02
    assert found[30:, :30].min() > 0.1


def test_components_are_divided_by_the_root_of_their_deviation() -> None:
    features = unit(400, 12).double()
    mean = features.mean(dim=0)
    left = (features - mean).numpy()
    variance, direction = np.linalg.eigh(left.T @ left / 400)
    deviation = np.sqrt(np.maximum(variance, 0))
    expected = left @ direction / np.sqrt(deviation + 0.1 * deviation.mean())
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = half_whitened(features.float()).numpy()
    # The signs of the components are arbitrary; similarities are not.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)


def test_at_most_128_components_are_kept() -> None:
    assert half_whitened(unit(300, 200)).shape == (300, 128)
    assert half_whitened(unit(10, 200)).shape == (10, 9)


@pytest.mark.parametrize("change", [half_whitened, without_mean])
def test_equal_images_stay_as_they_are(change) -> None:
    features = unit(1, 16).expand(7, 16)
    assert torch.equal(change(features), features)
    assert change(features[:0]).shape == (0, 16)


def test_mean_is_subtracted() -> None:
    features = unit(50, 16)
    expected = F.normalize(features - features.mean(dim=0), dim=1)
    torch.testing.assert_close(without_mean(features), expected)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from torch import Tensor

from helpers.features import units
from selcon_plugin.clustering import _jaccard_torch
from selcon_plugin.clustering.jaccard import ZERO, jaccard_distance
from selcon_plugin.clustering.knn import nearest_neighbors

GOLDEN = Path(__file__).parents[1] / "golden"
BACKENDS = ["numba", "torch"]
Array = NDArray[Any]


def people(num_images: int = 120, dim: int = 24, seed: int = 0) -> Tensor:
    """Return features around one center per twelve images, in random order."""
    centers = units(max(1, num_images // 12), dim, seed=seed)
    drawn = torch.randint(
        0, len(centers), (num_images,), generator=torch.Generator().manual_seed(seed)
    )
    return F.normalize(centers[drawn] + 0.8 * units(num_images, dim, seed=seed + 1), dim=1)


def jaccard_by_loops(features: Tensor, k1: int, k2: int) -> Array:
    """Compute the distances by their definition, with sets and dictionaries."""
    vectors = F.normalize(features.double(), dim=1)
    cosine = (vectors @ vectors.T).tolist()
    images = range(len(features))
    ranked = [sorted(images, key=lambda j: (j != i, -cosine[i][j], j))[:k1] for i in images]

    def reciprocal(i: int, ranks: int) -> set[int]:
        return {j for j in ranked[i][:ranks] if i in ranked[j][:ranks]}

    rows = []
    for i in images:
        members = reciprocal(i, k1)
        expanded = set(members)
        for q in members:
            half = reciprocal(q, round(k1 / 2) + 1)
            if len(half & members) > 2 / 3 * len(half):
                expanded |= half
        weight = {j: np.exp(-(2 - 2 * cosine[i][j])) for j in expanded}
        rows.append({j: w / sum(weight.values()) for j, w in weight.items()})
    averaged = []
    for i in images:
        near = ranked[i][:k2]
        columns = set().union(*(rows[j] for j in near))
        averaged.append(
            {c: sum(rows[j].get(c, 0) for j in near) / len(near) for c in columns}
        )
    distance = np.ones((len(features), len(features)))
    for i in images:
        for j in images:
            shared = sum(min(w, averaged[j].get(c, 0)) for c, w in averaged[i].items())
            distance[i, j] = max(0, 1 - shared / (2 - shared))
    return distance


def dense(distance: Any) -> Array:
    result = np.ones(distance.shape, np.float32)
    entries = distance.tocoo()
    result[entries.row, entries.col] = entries.data
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_distances_and_clusters(case: str, backend: Any) -> None:
    with np.load(GOLDEN / f"jaccard_{case}.npz") as golden:
        k1, k2, eps, min_samples = golden["hyper"].tolist()
        features, expected, labels = golden["features"], golden["jaccard"], golden["labels"]
    options = {"k1": int(k1), "k2": int(k2), "backend": backend}
    np.testing.assert_allclose(
        dense(jaccard_distance(features, **options)), expected, rtol=0, atol=1e-5
    )
    near = jaccard_distance(features, max_distance=eps, **options)
    clusters = DBSCAN(eps=eps, min_samples=int(min_samples), metric="precomputed")
    found = clusters.fit(near).labels_
    pairs = set(zip(found.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == len(set(found.tolist())) == len(set(labels.tolist()))
    assert ((found == -1) == (labels == -1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("k1", "k2"), [(20, 6), (30, 1), (7, 3), (5, 9), (3, 2), (2, 1), (1, 1)]
)
def test_equals_the_definition_in_loops(k1: int, k2: int, backend: Any) -> None:
    features = people()
    found = jaccard_distance(features, k1=k1, k2=k2, backend=backend)
    expected = jaccard_by_loops(features, k1, min(k2, k1))
    np.testing.assert_allclose(dense(found), expected, rtol=0, atol=2e-6)


def test_each_device_gives_the_same(device: str) -> None:
    features = people(300)
    expected = jaccard_by_loops(features[:80], 20, 6)
    found = jaccard_distance(features[:80].to(device), k1=20)
    np.testing.assert_allclose(dense(found), expected, rtol=0, atol=2e-6)


def test_torch_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = people(150)
    expected = jaccard_distance(features, k1=12, backend="torch")
    monkeypatch.setattr(_jaccard_torch, "PIECE_ELSEWHERE", 700)
    monkeypatch.setattr(_jaccard_torch, "SUMS_ELSEWHERE", 1000)
    found = jaccard_distance(features, k1=12, backend="torch")
    assert (found.indptr == expected.indptr).all()
    assert (found.indices == expected.indices).all()
    np.testing.assert_allclose(found.data, expected.data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [0.1, 0.3, 0.6, 0.95, 1.0, 2.0])
def test_max_distance_only_removes_larger_distances(limit: float, backend: Any) -> None:
    features = people(400)
    whole = jaccard_distance(features, k1=20, backend=backend).tocoo()
    found = jaccard_distance(features, k1=20, max_distance=limit, backend=backend)
    kept = whole.data <= limit
    pairs = set(zip(whole.row[kept].tolist(), whole.col[kept].tolist(), strict=True))
    entries = found.tocoo()
    assert set(zip(entries.row.tolist(), entries.col.tolist(), strict=True)) == pairs
    np.testing.assert_allclose(entries.data, whole.data[kept], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_distance_zero_keeps_exact_duplicates(backend: Any) -> None:
    features = people(60).repeat(2, 1)
    found = jaccard_distance(features, k1=12, max_distance=0.0, backend=backend)
    assert found.nnz >= 240
    assert (found.data == np.float32(ZERO)).all()
    for i in range(60):
        assert found[i, i + 60] == found[i + 60, i] == np.float32(ZERO)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matrix_is_a_symmetric_csr_array_in_order(backend: Any) -> None:
    found = jaccard_distance(people(200), k1=15, backend=backend)
    assert type(found).__name__ == "csr_array"
    assert found.dtype == np.float32
    assert found.data.flags.writeable
    assert all((np.diff(found[[i]].indices) > 0).all() for i in range(200))
    assert abs(found - found.T).max() < 1e-6
    assert (found.diagonal() == np.float32(ZERO)).all()
    assert found.data.min() > 0
    assert found.data.max() < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_duplicates_are_stored(backend: Any) -> None:
    features = people(60).repeat_interleave(3, dim=0)
    found = jaccard_distance(features, k1=12, k2=6, backend=backend)
    expected = jaccard_by_loops(features, 12, 6)
    for i in range(180):
        for j in range(i // 3 * 3, i // 3 * 3 + 3):
            assert 0 < found[i, j] < 1  # stored: a missing entry reads as 0
    same = np.arange(180)[:, None] // 3 == np.arange(180)[None, :] // 3
    assert dense(found)[same].max() <= expected[same].max() + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 10])
def test_fewer_images_than_ranks(num_images: int, backend: Any) -> None:
    features = people(30)[:num_images]
    found = jaccard_distance(features, k1=30, k2=6, backend=backend)
    assert found.shape == (num_images, num_images)
    expected = jaccard_by_loops(features, 30, 6)
    np.testing.assert_allclose(dense(found), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_images", [20, 300])
def test_identical_images(num_images: int, backend: Any) -> None:
    features = units(1, 8).repeat(num_images, 1)
    found = jaccard_distance(features, k1=30, backend=backend)
    assert (found.diagonal() == np.float32(ZERO)).all()
    if num_images <= 30:  # all images have the same neighborhood
        assert found.nnz == num_images**2
        assert found.data.max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_forms(backend: Any) -> None:
    features = people(80)
    expected = jaccard_distance(features, k1=10, backend=backend)
    scales = torch.linspace(0.01, 50, 80)[:, None]
    forms = [
        features.numpy(),
        features.double().numpy(),
        (features * scales).requires_grad_(),
        features.T.contiguous().T,
    ]
    for form in forms:
        found = jaccard_distance(form, k1=10, backend=backend)
        np.testing.assert_allclose(dense(found), dense(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_neighbors_are_used(backend: Any) -> None:
    features = people(100)
    more = nearest_neighbors(features, 25)
    expected = jaccard_distance(features, k1=15, backend=backend)
    found = jaccard_distance(features, k1=15, neighbors=more, backend=backend)
    assert abs(found - expected).max() < 1e-6
    shifted = more._replace(index=more.index.roll(1, dims=0))
    other = jaccard_distance(features, k1=15, neighbors=shifted, backend=backend)
    assert abs(other - expected).max() > 0.1
    with pytest.raises(ValueError, match="at least 30 columns for 100 images"):
        jaccard_distance(features, neighbors=more, backend=backend)


def test_the_number_of_threads_changes_nothing() -> None:
    features = people(1300)
    one = jaccard_distance(features, max_distance=0.7, backend="numba")
    try:
        torch.set_num_threads(3)
        three = jaccard_distance(features, max_distance=0.7, backend="numba")
    finally:
        torch.set_num_threads(1)
    assert (one.indptr == three.indptr).all()
    assert (one.indices == three.indices).all()
    assert (one.data == three.data).all()


def test_works_without_numba() -> None:
    program = (
        "import importlib.util, sys\n"
        "sys.modules['numba'] = None\n"
        "known = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n: None if n == 'numba' else known(n)\n"
        "import numpy as np\n"
        "from selcon_plugin.clustering.jaccard import jaccard_distance\n"
        "print(jaccard_distance(np.eye(4, dtype='float32')).nnz)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "16\n", run.stderr


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    features = people(10).numpy().copy()
    features[7, 2] = value
    with pytest.raises(ValueError, match="features of image 7 are not finite"):
        jaccard_distance(features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": 0}, "k1 .*1.*got 0"),
        ({"k2": 0}, "k2 .*1.*got 0"),
        ({"max_distance": -0.1}, "max_distance .*None.*got -0.1"),
        ({"max_distance": float("nan")}, "max_distance must be 0 or more"),
        ({"backend": "cupy"}, "backend .*auto, numba, torch.*got 'cupy'"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaccard_distance(people(10), **options)
    with pytest.raises(ValueError, match=r"features must be \(M, C\)"):
        jaccard_distance(torch.ones(3))

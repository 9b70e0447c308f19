from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units
from selcon_plugin.clustering import knn, neighbors
from selcon_plugin.clustering.compiled import shortlist as _shortlist
from selcon_plugin.clustering.compiled.rows import RowThreads
from selcon_plugin.clustering.compiled.shortlist import shortlist_neighbors
from selcon_plugin.clustering.knn import nearest_neighbors
from selcon_plugin.clustering.neighbors import Neighbors

EXACT = ["torch", "shortlist", "faiss"]


def clustered(num_images: int, dim: int, seed: int = 0) -> Tensor:
    """Return features with a common mean around centers, like those of a network."""
    centers = 2 + units(max(1, num_images // 12), dim, seed=seed)
    near = centers[torch.arange(num_images) % len(centers)]
    return F.normalize(near + 0.7 * units(num_images, dim, seed=seed + 1), dim=1)


def neighbors_by_loops(features: Tensor, k: int) -> Neighbors:
    products = features.double() @ features.double().T
    similarity, index = [], []
    for i, row in enumerate(products.tolist()):
        others = sorted((j for j in range(len(row)) if j != i), key=lambda j: (-row[j], j))
        ranked = [i, *others][:k]
        index.append(ranked)
        similarity.append([row[j] for j in ranked])
    return Neighbors(torch.tensor(similarity), torch.tensor(index))


def assert_nearest(found: Neighbors, features: Tensor, k: int) -> None:
    """Check against loops; images closer than float32 rounding may be swapped."""
    expected = neighbors_by_loops(features, k)
    assert found.similarity.dtype == torch.float32
    assert found.index.dtype == torch.int64
    torch.testing.assert_close(
        found.similarity.double(), expected.similarity.double(), rtol=0, atol=2e-6
    )
    assert torch.equal(found.index[:, 0], expected.index[:, 0])
    products = (features.double() @ features.double().T).gather(1, found.index)
    torch.testing.assert_close(
        products, expected.similarity.double(), rtol=0, atol=2e-6
    )  # the returned images have the expected similarities
    assert all(len(set(row)) == len(row) for row in found.index.tolist())


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("num_images", "k"), [(300, 30), (300, 1), (97, 97), (5, 30)])
def test_exact_backends_equal_a_loop(backend: str, num_images: int, k: int) -> None:
    features = clustered(num_images, 48)
    found = nearest_neighbors(features, k, backend=backend)  # type: ignore[arg-type]
    assert_nearest(found, features, min(k, num_images))


def test_torch_backend_equals_a_loop_on_each_device(device: str) -> None:
    features = clustered(300, 48)
    found = nearest_neighbors(features.to(device), 20)
    assert found.index.device.type == found.similarity.device.type == device
    assert_nearest(Neighbors(*(part.cpu() for part in found)), features, 20)


def test_torch_backend_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "ROWS", 16)
    monkeypatch.setattr(neighbors, "PRODUCTS_ELSEWHERE", 16 * 70)  # 70 columns at a time
    monkeypatch.setattr(neighbors, "GROUP", 2)
    features = clustered(301, 32)
    assert_nearest(nearest_neighbors(features, 9, backend="torch"), features, 9)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_few_images(backend: str, num_images: int) -> None:
    features = units(num_images, 8)
    found = nearest_neighbors(features, 3, backend=backend)  # type: ignore[arg-type]
    assert found.similarity.shape == found.index.shape == (num_images, num_images)
    assert found.index.tolist() == [[], [[0]], [[0, 1], [1, 0]]][num_images]


@pytest.mark.parametrize("backend", [*EXACT, "ivf"])
def test_an_image_comes_first_among_its_duplicates(backend: str) -> None:
    features = units(40, 16).repeat(10, 1)  # image i equals i + 40, i + 80, ...
    found = nearest_neighbors(features, 6, backend=backend)  # type: ignore[arg-type]
    assert found.index[:, 0].tolist() == list(range(400))
    assert torch.equal(found.index % 40, torch.arange(400)[:, None].expand(-1, 6) % 40)


@pytest.mark.parametrize("backend", ["torch", "shortlist"])
def test_ties_go_to_the_smaller_index(backend: str) -> None:
    features = torch.eye(4).repeat_interleave(150, dim=0)  # products are 0 or 1, exactly
    found = nearest_neighbors(features, 5, backend=backend)  # type: ignore[arg-type]
    for i, row in enumerate(found.index.tolist()):
        alike = range(i // 150 * 150, i // 150 * 150 + 150)
        assert row == [i, *[j for j in alike if j != i][:4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shortlist_ranks_what_bfloat16_cannot_distinguish(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shortlist, "BLOCK", 64)  # many blocks, the last one smaller
    # 20 images of a group differ by less than bfloat16 resolves, and the k-th rank falls
    # into the group.
    centers = units(30, 64)
    features = F.normalize(centers.repeat_interleave(20, 0) + 2e-3 * units(600, 64), dim=1)
    narrow = features.bfloat16().float() @ features.bfloat16().float().T
    wrong = narrow.bfloat16().float().topk(12, dim=1).indices.sort(dim=1).values
    found = shortlist_neighbors(features, 12, dtype=dtype)
    assert_nearest(found, features, 12)
    right = found.index.sort(dim=1).values
    assert (wrong != right).any(dim=1).float().mean() > 0.9  # the case is a hard one


def test_shortlist_is_the_same_in_both_types_and_for_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_shortlist, "BLOCK", 90)
    features = clustered(1000, 96)
    results = []
    try:
        for dtype, threads in (
            (torch.float32, 1),
            (torch.bfloat16, 1),
            (torch.bfloat16, 3),
        ):
            torch.set_num_threads(threads)
            results.append(shortlist_neighbors(features, 20, dtype=dtype))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert torch.equal(other.index, results[0].index)
        assert torch.equal(other.similarity, results[0].similarity)


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_shortlist_with_more_similar_images_than_capacity(scale: float) -> None:
    alike = units(1, 32) + scale * units(700, 32, seed=5)
    features = F.normalize(torch.cat([alike, units(100, 32, seed=6)]), dim=1)
    found = shortlist_neighbors(features, 10, dtype=torch.bfloat16)
    assert_nearest(found, features, 10)


def test_shortlist_of_vectors_of_any_length() -> None:
    features = clustered(400, 32) * torch.linspace(0.1, 30, 400)[:, None]
    found = shortlist_neighbors(features, 10, dtype=torch.bfloat16)
    expected = neighbors_by_loops(features, 10)
    assert (found.index == expected.index).float().mean() > 0.999


def test_the_error_bound_holds_for_every_pair() -> None:
    features = clustered(200, 256)
    with RowThreads() as threads:
        rounded = _shortlist._round(threads, features, torch.bfloat16)
    products = (rounded.features @ rounded.features.T).double()
    shift, slack = (torch.from_numpy(part).double() for part in rounded[1:])
    estimate = products + shift[:, None] + shift[None, :]
    error = (estimate - features.double() @ features.double().T).abs()
    bound = slack[:, None] + slack[None, :] + _shortlist.BFLOAT16_ROUNDOFF * products.abs()
    assert (error <= bound).all()
    assert bound.mean() < 0.01  # and is tight


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7, 8])
def test_every_block_is_paired_with_every_other_once(num_blocks: int) -> None:
    met = []
    for first, second in _shortlist._rounds(num_blocks):
        pairs = list(zip(first, second, strict=True))
        busy = [block for pair in pairs for block in set(pair)]
        assert len(set(busy)) == len(busy)  # no block occurs twice in a round
        met += pairs
    everyone = range(num_blocks)
    assert sorted(met) == [(i, j) for i in everyone for j in everyone if i <= j]


def test_ivf_finds_most_neighbors() -> None:
    features = clustered(3000, 32)
    found = nearest_neighbors(features, 10, backend="ivf")
    expected = nearest_neighbors(features, 10, backend="torch")
    hits = (found.index[:, :, None] == expected.index[:, None, :]).any(dim=2)
    assert hits.float().mean() > 0.9
    assert (found.index >= 0).all()


@pytest.mark.parametrize("backend", ["torch", "shortlist"])
def test_enclosing_precision_settings_have_no_effect(backend: str) -> None:
    features = clustered(300, 64)
    expected = nearest_neighbors(features, 10, backend=backend)  # type: ignore[arg-type]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_neighbors(features, 10, backend=backend)  # type: ignore[arg-type]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.similarity, expected.similarity)
    assert torch.equal(found.index, expected.index)


def lacking(*missing: str) -> Callable[[str], object]:
    return lambda name: None if name in missing else object()


@pytest.mark.parametrize(
    ("num_images", "missing", "backend"),
    [
        (100, (), "torch"),
        (10_000, (), "shortlist"),
        (10_000, ("numba",), "faiss"),
        (10_000, ("numba", "faiss"), "torch"),
        (3_000_000, (), "ivf"),
        (3_000_000, ("faiss",), "shortlist"),
    ],
)
def test_auto_chooses_by_size_and_what_is_installed(
    num_images: int,
    missing: tuple[str, ...],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knn.importlib.util, "find_spec", lacking(*missing))
    assert knn._choose(torch.zeros(1, 1).expand(num_images, 1))[0] == backend


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="selcon_plugin"):
        nearest_neighbors(units(10, 4), 3)
    assert "3 nearest neighbors of 10 images: torch (at most 2000 images)" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    features = units(5, 4)
    features[3, 1] = value
    with pytest.raises(ValueError, match=r"features of image 3 are not finite"):
        nearest_neighbors(features, 2)


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features must be \(M, C\), got shape \(3,\)"):
        nearest_neighbors(torch.ones(3), 2)
    with pytest.raises(ValueError, match="k counts the image itself"):
        nearest_neighbors(units(3, 4), 0)
    with pytest.raises(ValueError, match=r"backend .*auto, torch"):
        nearest_neighbors(units(3, 4), 2, backend="annoy")  # type: ignore[arg-type]


def test_a_missing_faiss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"needs faiss: .* pip install "):
        nearest_neighbors(units(3, 4), 2, backend="faiss")

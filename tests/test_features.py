from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selcon_plugin.distance import fused_distance
from selcon_plugin.features import (
    Embeddings,
    GlobalPartEmbedding,
    fused_feature,
    split_stripes,
)


def feature_map(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def units(*shape: int, seed: int) -> Tensor:
    return F.normalize(feature_map(*shape, seed=seed), dim=-1)


def rows_of_stripes(height: int, num_parts: int) -> list[list[int]]:
    rows = torch.arange(height).float()[None, None, :, None].expand(2, 3, height, 2)
    return [stripe[0, 0, :, 0].int().tolist() for stripe in split_stripes(rows, num_parts)]


@pytest.mark.parametrize(
    ("height", "num_parts", "expected"),
    [
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (3, 3, [[0], [1], [2]]),
        (5, 1, [[0, 1, 2, 3, 4]]),
        (10, 4, [[0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9]]),
    ],
)
def test_stripes_hold_their_rows(
    height: int, num_parts: int, expected: list[list[int]]
) -> None:
    assert rows_of_stripes(height, num_parts) == expected


@pytest.mark.parametrize("height", range(8, 33))
def test_no_row_is_omitted_and_stripes_are_of_nearly_equal_height(height: int) -> None:
    stripes = rows_of_stripes(height, 8)
    assert sorted({row for stripe in stripes for row in stripe}) == list(range(height))
    sizes = [len(stripe) for stripe in stripes]
    assert max(sizes) - min(sizes) <= 1


def test_too_few_rows_is_an_error_with_the_remedy() -> None:
    head = GlobalPartEmbedding(4, 16, 8)
    with pytest.raises(ValueError, match=r"7 rows into 8 horizontal parts") as error:
        head(feature_map(2, 4, 7, 3))
    for key in ("NUM_PARTS", "LAST_STRIDE", "larger input"):
        assert key in str(error.value)


@pytest.mark.parametrize("height", [6, 7])
def test_equals_a_loop_over_the_parts(height: int) -> None:
    torch.manual_seed(0)
    head = GlobalPartEmbedding(5, 12, 3)
    nn.init.normal_(head.part_bias)
    nn.init.uniform_(head.part_norm.weight, 0.5, 1.5)
    nn.init.normal_(head.part_norm.bias)
    images = feature_map(4, 5, height, 2)
    found = head(images)

    expected_global = F.linear(
        images.mean(dim=(2, 3)), head.global_projection.weight, head.global_projection.bias
    )
    expected_global = F.batch_norm(expected_global, None, None, training=True)
    torch.testing.assert_close(found.global_features, F.normalize(expected_global, dim=1))
    assert found.part_features is not None
    for part, stripe in enumerate(split_stripes(images, 3)):
        vector = F.linear(
            stripe.mean(dim=(2, 3)), head.part_weight[part], head.part_bias[part]
        )
        channels = slice(4 * part, 4 * part + 4)
        vector = F.batch_norm(
            vector,
            None,
            None,
            head.part_norm.weight[channels],
            head.part_norm.bias[channels],
            training=True,
        )
        torch.testing.assert_close(found.part_features[:, part], F.normalize(vector, dim=1))


def test_part_sees_only_its_own_rows() -> None:
    torch.manual_seed(0)
    head = GlobalPartEmbedding(5, 12, 3).eval()
    images = feature_map(2, 5, 6, 2)
    changed = images.clone()
    changed[:, :, 2:4] += 1.0  # the middle stripe
    before, after = head(images).part_features, head(changed).part_features
    same = [torch.equal(before[:, part], after[:, part]) for part in range(3)]
    assert same == [True, False, True]


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_are_float32_unit_vectors(autocast: bool) -> None:
    torch.manual_seed(0)
    head = GlobalPartEmbedding(8, 16, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        global_features, parts = head(feature_map(6, 8, 9, 4))
    assert global_features.shape == (6, 16)
    assert parts.shape == (6, 4, 4)
    for vectors in (global_features, parts):
        assert vectors.dtype == torch.float32
        lengths = vectors.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)


def test_autocast_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    head = GlobalPartEmbedding(8, 16, 4).eval()
    images = feature_map(6, 8, 9, 4)
    expected = head(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(images)
    for half, full in zip(found, expected, strict=True):
        assert F.cosine_similarity(half, full, dim=-1).min() > 0.999


class PowerPool(nn.Module):
    """Pooling layer with a learnable exponent for the global vector and the stripes."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(3.0))

    def forward(self, images: Tensor) -> Tensor:
        powered = images.clamp(min=1e-6).pow(self.exponent)
        return powered.mean(dim=(2, 3), keepdim=True).pow(1.0 / self.exponent)


def test_pool_and_norm_are_replaceable() -> None:
    torch.manual_seed(0)
    head = GlobalPartEmbedding(
        6, 6, 2, project_global=False, pool=PowerPool, norm=lambda _: nn.Identity()
    )
    assert not [m for m in head.modules() if isinstance(m, (nn.Linear, nn.BatchNorm2d))]
    images = feature_map(3, 6, 4, 2).abs()
    global_features, parts = head(images)
    expected = F.normalize(PowerPool()(images).flatten(1), dim=1)
    torch.testing.assert_close(global_features, expected)
    parts.sum().backward()
    assert head.pool.exponent.grad is not None


def test_norm_is_made_for_the_channels_it_gets() -> None:
    made = []

    def make_norm(channels: int) -> nn.Module:
        made.append(channels)
        return nn.GroupNorm(2, channels)

    head = GlobalPartEmbedding(5, 8, 2, norm=make_norm)
    head(feature_map(1, 5, 4, 2))  # one image: no batch statistics needed
    assert made == [8, 8]


def test_no_parts_disables_the_part_branch() -> None:
    head = GlobalPartEmbedding(5, 7, 0)  # without parts 7 need not be a multiple
    embeddings = head(feature_map(3, 5, 1, 1))
    assert embeddings.part_features is None
    assert embeddings.global_features.shape == (3, 7)
    assert not [name for name, _ in head.named_parameters() if "part" in name]


def test_impossible_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"\(30\) must be a multiple .* \(8\).*NUM_PARTS"):
        GlobalPartEmbedding(4, 30, 8)
    with pytest.raises(
        ValueError, match=r"without a projection .*\(16\) must equal .*\(4\)"
    ):
        GlobalPartEmbedding(4, 16, 8, project_global=False)
    with pytest.raises(ValueError, match=r"num_parts .*0.*got -1"):
        GlobalPartEmbedding(4, 16, -1)


@pytest.mark.parametrize("weight", [0.5, 0.2, 1.0, 0.0])
def test_cosine_of_fused_features_ranks_like_the_fused_distance(weight: float) -> None:
    query = Embeddings(units(4, 12, seed=0), units(4, 3, 4, seed=1))
    gallery = Embeddings(units(30, 12, seed=2), units(30, 3, 4, seed=3))
    distance = fused_distance(
        *query,
        None,
        *gallery,
        None,
        global_distance_weight=weight,  # type: ignore[arg-type]
    )
    a = fused_feature(query, global_distance_weight=weight)
    b = fused_feature(gallery, global_distance_weight=weight)
    assert a.shape == (4, 24)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(2 - 2 * a @ b.T, distance, rtol=0, atol=2e-6)
    assert torch.equal((a @ b.T).argsort(dim=1, descending=True), distance.argsort(dim=1))


def test_fused_feature_without_parts_is_the_global_one() -> None:
    features = units(4, 12, seed=0)
    assert torch.equal(fused_feature(Embeddings(features)), features)


def test_detached_embeddings_leave_the_graph_in_both_views() -> None:
    leaf = torch.ones(2, 4, requires_grad=True)
    detached = Embeddings(leaf * 2, (leaf * 3).unflatten(1, (2, 2))).detach()
    assert not detached.global_features.requires_grad
    assert detached.part_features is not None
    assert not detached.part_features.requires_grad
    assert Embeddings(leaf * 2).detach().part_features is None

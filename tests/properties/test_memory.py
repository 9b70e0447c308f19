"""Properties of the banks for any writes: sizes from 0, duplicates, outliers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.tri_bank import TriBankMemory
from selcon_plugin.memory.writes import cluster_means, write_rows

seeds = st.integers(0, 2**31)
momenta = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


def units(*shape: int, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    # All have the same sign: if a row and a write nearly cancel, rounding is amplified.
    return F.normalize(values.abs(), dim=-1)


def choose(high: int, count: int, *, seed: int, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A bank without rows still needs one value: all labels are then outliers.
    return torch.randint(low, max(high, low + 1), (count,), generator=generator)


def write_one(bank: Tensor, row: int, feature: Tensor, momentum: float) -> None:
    mixed = momentum * bank[row] + (1 - momentum) * feature
    bank[row] = mixed / mixed.norm()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@given(
    num_rows=st.integers(1, 8),
    num_writes=st.integers(0, 30),
    num_features=st.integers(1, 6),
    dim=st.integers(2, 5),
    momentum=momenta,
    seed=seeds,
)
def test_writes_are_those_of_a_loop(
    num_rows: int, num_writes: int, num_features: int, dim: int, momentum: float, seed: int
) -> None:
    bank = units(num_rows, dim, seed=seed)
    features = units(num_features, dim, seed=seed + 1)
    rows = choose(num_rows, num_writes, seed=seed + 2)
    source = choose(num_features, num_writes, seed=seed + 3)
    expected, found = bank.clone(), bank.clone()
    for row, place in zip(rows.tolist(), source.tolist(), strict=True):
        write_one(expected, row, features[place], momentum)
    write_rows(found, rows, features, source, momentum=momentum)
    assert_close(found, expected)
    untouched = torch.ones(num_rows, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(found[untouched], bank[untouched])
    assert_close(found.norm(dim=1), torch.ones(num_rows))


@st.composite
def cluster_batches(draw: Any) -> dict[str, Any]:
    """Generate a memory of 0 to 6 clusters, and a batch of 0 to 12 images with outliers."""
    num_clusters, seed = draw(st.integers(0, 6)), draw(seeds)
    count = draw(st.integers(0, 12))
    dim = draw(st.integers(2, 5))
    features = units(count, dim, seed=seed + 1)
    if count and draw(st.booleans()):  # exact duplicates
        features = features[choose(count, count, seed=seed + 2)]
    return {
        "rows": units(num_clusters, dim, seed=seed),
        "features": features * draw(st.sampled_from([1.0, 3.0])),
        "targets": choose(num_clusters, count, low=-1, seed=seed + 3),
        "momentum": draw(momenta),
        "update": draw(st.sampled_from(["mean", "hard", "batch_mean"])),
        "seed": seed,
    }


def written_by_loops(case: dict[str, Any]) -> Tensor:
    bank, momentum = case["rows"].clone(), case["momentum"]
    unit = F.normalize(case["features"], dim=1)
    for cluster in range(len(bank)):
        members = unit[case["targets"] == cluster]
        if not len(members):
            continue
        if case["update"] == "hard":
            similarity = [float(member @ bank[cluster]) for member in members]
            members = members[similarity.index(min(similarity))][None]
        elif case["update"] == "batch_mean":
            members = members.mean(dim=0, keepdim=True)
        for member in members:
            write_one(bank, cluster, member, momentum)
    return bank


def updated(case: dict[str, Any]) -> Tensor:
    memory = ClusterMemory(case["rows"], momentum=case["momentum"], update=case["update"])
    memory.update(case["features"], case["targets"])
    return memory.bank


@given(cluster_batches())
def test_cluster_memory_is_its_definition(case: dict[str, Any]) -> None:
    assert_close(updated(case), written_by_loops(case))


@given(cluster_batches())
def test_renamed_clusters_rename_the_rows(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    names = torch.randperm(len(case["rows"]), generator=generator)
    renamed = case | {
        "rows": case["rows"][names.argsort()],
        "targets": torch.cat([names, torch.tensor([-1])])[case["targets"]],
    }
    assert torch.equal(updated(renamed)[names], updated(case))


@given(cluster_batches())
def test_outliers_change_nothing(case: dict[str, Any]) -> None:
    clustered = case["targets"] >= 0
    without = case | {
        "features": case["features"][clustered],
        "targets": case["targets"][clustered],
    }
    assert torch.equal(updated(without), updated(case))


@given(
    num_images=st.integers(0, 10),
    num_clusters=st.integers(0, 5),
    dim=st.integers(1, 4),
    seed=seeds,
)
def test_cluster_means_are_means(
    num_images: int, num_clusters: int, dim: int, seed: int
) -> None:
    features = units(num_images, dim, seed=seed)
    labels = choose(num_clusters, num_images, low=-1, seed=seed + 1)
    found = cluster_means(features, labels, num_clusters=num_clusters, normalize=False)
    assert found.shape == (num_clusters, dim)
    for cluster in range(num_clusters):
        members = features[labels == cluster]
        expected = members.mean(dim=0) if len(members) else torch.zeros(dim)
        assert_close(found[cluster], expected)
    read = cluster_means(features, labels, normalize=False)
    assert torch.equal(read, found[: len(read)])
    assert len(read) == max([-1, *labels.tolist()]) + 1


@given(
    num_images=st.integers(1, 8),
    count=st.integers(0, 12),
    dim=st.integers(2, 5),
    momentum=momenta,
    seed=seeds,
)
def test_instance_memory_writes_each_image_in_batch_order(
    num_images: int, count: int, dim: int, momentum: float, seed: int
) -> None:
    memory = InstanceMemory(num_images, dim, momentum=momentum)
    memory.fill(units(num_images, dim, seed=seed))
    expected = memory.bank.clone()
    index = choose(num_images, count, seed=seed + 1)
    features = units(count, dim, seed=seed + 2)
    for row, feature in zip(index.tolist(), features, strict=True):
        write_one(expected, row, feature, momentum)
    memory.update(index, 2.0 * features)
    assert_close(memory.bank, expected)


@given(
    num_images=st.integers(1, 8),
    count=st.integers(0, 6),
    num_neighbors=st.integers(0, 7),
    num_parts=st.sampled_from([0, 1, 2]),
    momentum=momenta,
    mixture_update=st.sampled_from(["positives", "self"]),
    masked=st.booleans(),
    seed=seeds,
)
def test_three_banks_are_written_in_the_order_of_the_definition(
    num_images: int,
    count: int,
    num_neighbors: int,
    num_parts: int,
    momentum: float,
    mixture_update: Any,
    masked: bool,
    seed: int,
) -> None:
    part_dim = 4 // num_parts if num_parts else 0
    memory = TriBankMemory(
        num_images, 4, num_parts, part_dim, momentum=momentum, mixture_update=mixture_update
    )
    parts = units(count, num_parts, part_dim, seed=seed + 1) if num_parts else None
    memory.initialize(
        units(num_images, 4, seed=seed),
        units(num_images, num_parts, part_dim, seed=seed + 2) if num_parts else None,
    )
    memory.mixture_bank.copy_(units(num_images, 4, seed=seed + 3))
    banks = {name: bank.clone() for name, bank in memory.named_buffers()}
    index = choose(num_images, count, seed=seed + 4)
    features = units(count, 4, seed=seed + 5)
    columns = min(1 + num_neighbors, num_images)
    positives = choose(num_images, count * columns, seed=seed + 6).view(count, columns)
    positives[:, 0] = index
    mask = choose(2, count * columns, seed=seed + 7).view(count, columns).bool()
    memory.update(index, features, parts, positives, mask if masked else None)

    sources = [features] if parts is None else [parts.flatten(1), features]
    for i, row in enumerate(index.tolist()):
        write_one(banks["global_bank"], row, features[i], momentum)
        for s in range(num_parts):
            assert parts is not None
            write_one(banks["part_bank"][:, s], row, parts[i, s], momentum)
    to_own = mixture_update == "self"
    for source in sources:
        for column in reversed(range(1 if to_own else columns)):
            for i in range(count):
                if masked and not to_own and not mask[i, column]:
                    continue
                write_one(
                    banks["mixture_bank"], int(positives[i, column]), source[i], momentum
                )
    for name, bank in memory.named_buffers():
        assert_close(bank, banks[name])

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.features import units
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means

CLUSTERS, B, C = 6, 16, 8
UPDATES = ["mean", "hard", "batch_mean"]


def make_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return unnormalized features, unordered clusters (two empty) and two outliers."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.tensor([3, 0, 3, -1, 5, 0, 3, 3, 5, 0, -1, 2, 5, 3, 0, 5])
    return torch.randn(B, C, generator=generator), targets


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def update_by_loops(
    bank: Tensor, features: Tensor, targets: Tensor, momentum: float, update: str
) -> Tensor:
    before, bank = bank, bank.clone()
    members: dict[int, list[Tensor]] = {}
    for feature, cluster in zip(features, targets.tolist(), strict=True):
        if cluster != -1:
            members.setdefault(cluster, []).append(unit(feature))
    for cluster, images in members.items():
        if update == "hard":
            images = [min(images, key=lambda image: float(image @ before[cluster]))]
        elif update == "batch_mean":
            images = [sum(images, torch.zeros(C)) / len(images)]
        for image in images:
            bank[cluster] = unit(momentum * bank[cluster] + (1 - momentum) * image)
    return bank


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.9])
def test_update_equals_definition_by_loops(
    update: str, momentum: float, device: str
) -> None:
    bank = units(CLUSTERS, C, seed=0)
    memory = ClusterMemory(bank, momentum=momentum, update=update).to(device)  # type: ignore[arg-type]
    features, targets = (tensor.to(device) for tensor in make_batch())
    before = memory.bank.clone().cpu()
    inputs = features.clone(), targets.clone()
    expected = update_by_loops(bank, features.cpu(), targets.cpu(), momentum, update)
    memory.update(features.requires_grad_(), targets)
    torch.testing.assert_close(memory.bank.cpu(), expected, rtol=0, atol=1e-6)
    absent = [1, 4]
    assert torch.equal(memory.bank[absent].cpu(), before[absent])
    assert not memory.bank.requires_grad
    assert torch.equal(features, inputs[0])
    assert torch.equal(targets, inputs[1])


def test_only_the_mean_update_depends_on_the_batch_order() -> None:
    features, targets = make_batch()
    for update in UPDATES:
        banks = []
        for order in (torch.arange(B), torch.arange(B).flip(0)):
            memory = ClusterMemory(units(CLUSTERS, C, seed=0), update=update)  # type: ignore[arg-type]
            memory.update(features[order], targets[order])
            banks.append(memory.bank)
        same = torch.allclose(*banks, rtol=0, atol=1e-6)
        assert same == (update != "mean")


def test_hard_update_compares_with_the_row_before_the_step() -> None:
    # After the write of the first image the row is (0, 1), to which the second image is
    # much less similar. The first is selected, because the old row counts.
    memory = ClusterMemory(torch.tensor([[1.0, 0.0]]), momentum=0.0, update="hard")
    features = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    memory.update(features, torch.tensor([0, 0]))
    assert memory.bank.tolist() == [[0.0, 1.0]]


def test_hard_update_uses_the_first_of_equally_hard_images() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -3.0]])
    for order, expected in (([0, 1, 2], 1.0), ([2, 1, 0], -1.0)):
        memory = ClusterMemory(torch.tensor([[1.0, 0.0]]), momentum=0.0, update="hard")
        memory.update(features[order], torch.zeros(3, dtype=torch.int64))
        assert memory.bank.tolist() == [[0.0, expected]]


def test_batch_mean_is_not_scaled_before_it_is_mixed() -> None:
    memory = ClusterMemory(torch.tensor([[1.0, 0.0]]), momentum=0.5, update="batch_mean")
    features = torch.tensor([[0.6, 0.8], [-0.6, 0.8]])  # mean (0, 0.8)
    memory.update(features, torch.tensor([0, 0]))
    expected = F.normalize(torch.tensor([[0.5, 0.4]]), dim=1)
    torch.testing.assert_close(memory.bank, expected)


@pytest.mark.parametrize("update", UPDATES)
def test_outliers_only_write_nothing(update: str) -> None:
    memory = ClusterMemory(units(CLUSTERS, C, seed=0), update=update)  # type: ignore[arg-type]
    before = memory.bank.clone()
    memory.update(units(3, C, seed=1), torch.full((3,), -1))
    assert torch.equal(memory.bank, before)


@pytest.mark.parametrize("update", UPDATES)
def test_half_precision_features_are_averaged_in_float32(update: str) -> None:
    features, targets = make_batch()
    full = ClusterMemory(units(CLUSTERS, C, seed=0), update=update)  # type: ignore[arg-type]
    half = ClusterMemory(units(CLUSTERS, C, seed=0), update=update)  # type: ignore[arg-type]
    full.update(features.half().float(), targets)
    half.update(features.half(), targets)
    assert torch.equal(half.bank, full.bank)


def test_first_rows_are_copied_and_scaled_to_unit_length() -> None:
    rows = 3 * units(CLUSTERS, C, seed=0)
    memory = ClusterMemory(rows.requires_grad_())
    torch.testing.assert_close(memory.bank, units(CLUSTERS, C, seed=0))
    assert not memory.bank.requires_grad
    same = units(CLUSTERS, C, seed=0)
    ClusterMemory(same).bank.zero_()
    assert same.any()


def test_reset_accepts_another_number_of_clusters(device: str) -> None:
    memory = ClusterMemory(units(CLUSTERS, C, seed=0)).to(device)
    memory.reset((2 * units(3, C, seed=1)).to(device).half())
    assert (memory.bank.device.type, memory.bank.dtype) == (device, torch.float32)
    torch.testing.assert_close(memory.bank.cpu(), units(3, C, seed=1), rtol=0, atol=1e-3)
    torch.testing.assert_close(memory.bank.norm(dim=1).cpu(), torch.ones(3))
    assert "num_clusters=3" in repr(memory)
    memory.reset(torch.empty(0, C))
    assert memory.bank.shape == (0, C)


@pytest.mark.parametrize("saved_clusters", [0, 3, CLUSTERS, 9])
def test_checkpoint_restores_its_own_number_of_clusters(
    saved_clusters: int, device: str
) -> None:
    def model(num_clusters: int) -> nn.Module:
        layer, memory = nn.Linear(2, 2), ClusterMemory(units(num_clusters, C, seed=0))
        return nn.Sequential(layer, nn.Sequential(memory))

    saved = model(saved_clusters)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    fresh = model(CLUSTERS).to(device)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for name, value in saved.state_dict().items():
        assert torch.equal(fresh.state_dict()[name].cpu(), value)
    assert all(tensor.device.type == device for tensor in fresh.state_dict().values())


def test_loaded_rows_take_the_dtype_of_the_memory() -> None:
    memory = ClusterMemory(units(CLUSTERS, C, seed=0))
    memory.load_state_dict({"bank": units(3, C, seed=1).half()})
    assert memory.bank.dtype == torch.float32
    assert torch.equal(memory.bank, units(3, C, seed=1).half().float())


def test_checkpoint_of_another_network_or_without_a_bank_is_refused() -> None:
    memory = ClusterMemory(units(CLUSTERS, C, seed=0))
    before = memory.bank.clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for bank.*\[6, 9\]"):
        memory.load_state_dict({"bank": units(6, 9, seed=1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"bank"'):
        memory.load_state_dict({})
    assert torch.equal(memory.bank, before)


@pytest.mark.parametrize("update", UPDATES)
def test_resumed_run_equals_the_uninterrupted_one(update: str) -> None:
    def steps(memory: ClusterMemory, numbers: range) -> None:
        for number in numbers:
            memory.update(*make_batch(seed=number))

    unbroken = ClusterMemory(units(CLUSTERS, C, seed=0), update=update)  # type: ignore[arg-type]
    steps(unbroken, range(4))
    first = ClusterMemory(units(CLUSTERS, C, seed=0), update=update)  # type: ignore[arg-type]
    steps(first, range(2))
    second = ClusterMemory(torch.empty(0, C), update=update)  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    steps(second, range(2, 4))
    assert torch.equal(second.bank, unbroken.bank)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClusterMemory(torch.zeros(3)), r"\(num_clusters, C\), got shape \(3,\)"),
        (
            lambda: ClusterMemory(torch.zeros(3, 2), momentum=-0.1),
            r"momentum .*\[0, 1\], got -0.1",
        ),
        (
            lambda: ClusterMemory(torch.zeros(3, 2), update="median"),  # type: ignore[arg-type]
            "one of mean, hard, batch_mean, got 'median'",
        ),
        (
            lambda: ClusterMemory(torch.zeros(3, 2)).reset(torch.zeros(3, 4)),
            r"features must be \(num_clusters, 2\), got \(3, 4\)",
        ),
        (
            lambda: ClusterMemory(torch.zeros(3, 2)).update(
                torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64)
            ),
            r"targets .*each of the 4 features, got shape \(3,\)",
        ),
        (
            lambda: cluster_means(torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64)),
            r"labels .*each of the 4 features, got shape \(3,\)",
        ),
    ],
)
def test_wrong_arguments_are_reported(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_cluster_means_equal_definition_by_loops(device: str) -> None:
    features = units(200, C, seed=0)
    labels = torch.randint(-1, 20, (200,), generator=torch.Generator().manual_seed(1))
    labels[labels == 7] = 8  # a cluster without images
    found = cluster_means(features.to(device), labels)
    assert found.device.type == device
    assert found.shape == (20, C)
    for cluster in range(20):
        members = [features[i] for i in range(200) if labels[i] == cluster]
        expected = torch.zeros(C)
        if members:
            expected = unit(sum(members, expected) / len(members))
        torch.testing.assert_close(found[cluster].cpu(), expected)


def test_cluster_means_without_normalization_and_with_a_given_number(device: str) -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [5.0, 5.0]], device=device)
    labels = torch.tensor([0, 2, 0, -1], device=device)
    found = cluster_means(features, labels, num_clusters=4, normalize=False)
    assert found.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_product_with_a_plain_mean_is_the_mean_of_the_products(device: str) -> None:
    features, query = units(50, C, seed=0).to(device), units(1, C, seed=1)[0].to(device)
    labels = torch.arange(50) % 4 - 1
    labels[labels == 1] = 3  # a cluster without images
    means = cluster_means(features, labels, normalize=False)
    products = features @ query
    for cluster in (0, 2, 3):
        wanted = products[labels.to(device) == cluster].mean()
        torch.testing.assert_close(means[cluster] @ query, wanted)
    assert not means[1].any()


def test_cluster_means_are_the_same_every_time_and_in_float32(device: str) -> None:
    features = units(5000, 32, seed=0).to(device)
    labels = (torch.arange(5000) % 3).to(device)
    found = cluster_means(features, labels)
    assert torch.equal(found, cluster_means(features, labels))
    half = cluster_means(features.half(), labels)
    assert torch.equal(half, cluster_means(features.half().float(), labels))


def test_cluster_means_without_clusters_are_an_empty_bank() -> None:
    for size in (0, 4):
        means = cluster_means(torch.ones(size, C), torch.full((size,), -1))
        assert means.shape == (0, C)
        assert ClusterMemory(means).bank.shape == (0, C)

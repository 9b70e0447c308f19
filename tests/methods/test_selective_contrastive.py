from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.features import units
from selcon_plugin.distance import fused_distance
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import build_method
from selcon_plugin.methods.selective_contrastive import SelectiveContrastive
from selcon_plugin.selection import _warn_clamped

M, S, D = 30, 2, 4
C = S * D
OPTIONS: dict[str, Any] = {"num_neighbors": 3, "num_negatives": 8, "warmup_epochs": 1}


def embeddings_of(count: int, *, seed: int, parts: bool = True) -> Embeddings:
    part_features = units(count, S, D, seed=seed + 1000) if parts else None
    return Embeddings(units(count, C, seed=seed), part_features)


def make_method(
    num_images: int = M, *, camids: Tensor | None = None, parts: bool = True, **options: Any
) -> SelectiveContrastive:
    sizes = (S, D) if parts else (0, 0)
    method = build_method(
        "SelectiveContrastive", num_images, C, *sizes, **OPTIONS | options
    )
    assert isinstance(method, SelectiveContrastive)
    method.prepare(embeddings_of(num_images, seed=0, parts=parts), camids)
    method.memory.mixture_bank.copy_(units(num_images, C, seed=5))
    method.start_epoch(method.warmup_epochs)
    return method


def step(
    method: Any, index: Tensor, camids: Tensor | None = None, *, seed: int = 1
) -> Tensor:
    parts = method.num_parts > 0
    embeddings = embeddings_of(len(index), seed=seed, parts=parts)
    losses = method.loss(embeddings, index, camids)
    method.update(index, embeddings)
    return torch.stack(list(losses.values())).sum()


# --- read, loss, write ---


def test_loss_reads_and_update_writes() -> None:
    method = make_method(camids=torch.arange(M) % 3)
    before = copy.deepcopy(method.state_dict())
    index = torch.tensor([4, 9])
    leaves = embeddings_of(2, seed=1)
    embeddings = Embeddings(*(leaf.requires_grad_() for leaf in leaves))  # type: ignore[union-attr]
    losses = method.loss(embeddings, index, index % 3)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    method.update(index, embeddings)
    changed = {
        name
        for name, tensor in method.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {
        "_step",
        *(f"memory.{b}_bank" for b in ("global", "part", "mixture")),
    }
    assert not any(tensor.requires_grad for tensor in method.buffers())
    rows = (method.memory.global_bank != before["memory.global_bank"]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [4, 9]
    positives = method.selected_positives()
    assert positives is not None
    rows = (method.memory.mixture_bank != before["memory.mixture_bank"]).any(dim=1)
    touched = torch.cat([positives[0], positives[1].flatten()]).unique()
    assert torch.equal(rows.nonzero().flatten(), touched)


def test_update_without_loss_is_an_error() -> None:
    method = make_method()
    with pytest.raises(RuntimeError, match=r"update\(\) must follow loss\(\)"):
        method.update(torch.tensor([1, 2]), embeddings_of(2, seed=1))
    method.loss(embeddings_of(3, seed=1), torch.tensor([1, 2, 3]), None)
    with pytest.raises(RuntimeError, match=r"update\(\) must follow loss\(\)"):
        method.update(torch.tensor([1, 2]), embeddings_of(2, seed=1))
    step(method, torch.tensor([1, 2]))  # the failed step left no state


def test_memos_are_passed_to_update_unchanged() -> None:
    direct, handed = make_method(), make_method()
    index, batch = torch.tensor([4, 9, 4]), embeddings_of(3, seed=1)
    direct.loss(batch, index, None)
    direct.update(index, batch)
    handed.loss(batch, index, None)
    memos = handed.take_memos()
    handed.loss(embeddings_of(2, seed=2), index[:2], None)  # a skipped step
    handed.take_memos()
    handed.return_memos(memos)
    handed.update(index, batch)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, handed.state_dict()[name]), name


def test_losses_are_weighted_for_global_and_parts() -> None:
    index = torch.tensor([4, 9, 0])
    both = {}
    for weight in (0.0, 0.3, 1.0):
        losses = make_method(part_loss_weight=weight).loss(
            embeddings_of(3, seed=1), index, None
        )
        both[weight] = (losses["loss_global"].item(), losses["loss_part"].item())
    assert both[0.0][1] == 0.0
    assert both[1.0][0] == 0.0
    assert both[0.3] == pytest.approx((0.7 * both[0.0][0], 0.3 * both[1.0][1]))


# --- warm-up ---


def test_warm_up_contrasts_the_own_row_with_random_rows() -> None:
    method = make_method(warmup_epochs=2, seed=7)
    index = torch.tensor([4, 9, 4])
    chosen = []
    for epoch in (0, 1, 2):
        method.start_epoch(epoch)
        method.loss(embeddings_of(3, seed=1), index, None)
        chosen.append(method.select(embeddings_of(3, seed=1), index, None))
        if epoch < 2:
            assert method.selected_positives() is None
        method.update(index, embeddings_of(3, seed=1))
    for positives, negatives, *_ in chosen[:2]:
        assert positives.tolist() == [[4], [9], [4]]
        assert negatives.shape == (3, 8 + 3)  # N + K, so that the softmax has the same size
        assert not (negatives == index[:, None]).any()
    assert not torch.equal(chosen[0][1], chosen[1][1])  # sampled again in each step
    assert chosen[2][0].shape == (3, 1 + 3)
    assert chosen[2][1].shape == (3, 8)


def test_warm_up_sampling_depends_on_the_seed() -> None:
    def sample(seed: int) -> Tensor:
        method = make_method(seed=seed)
        method.start_epoch(0)
        return method.select(embeddings_of(1, seed=1), torch.tensor([3]), None)[1]

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_warm_up_loss_keeps_the_weight_of_the_own_row() -> None:
    method = make_method(self_weight=0.4)
    method.start_epoch(0)
    features, index = embeddings_of(2, seed=1), torch.tensor([3, 8])
    positives, negatives = method.select(features, index, None)[:2]
    candidates = torch.cat([positives, negatives], dim=1)
    rows = method.memory.mixture_bank[candidates]
    target = torch.zeros(2, dtype=torch.int64)
    logits = (rows @ features.global_features[:, :, None])[..., 0] / 0.1
    expected = 0.5 * 0.4 * F.cross_entropy(logits, target)
    torch.testing.assert_close(method.loss(features, index, None)["loss_global"], expected)


# --- cameras ---


def test_one_camera_or_none_selects_as_without_the_term() -> None:
    features, index = embeddings_of(5, seed=1), torch.tensor([0, 7, 3, 29, 12])

    def selected(
        known: Tensor | None, given: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return make_method(camids=known, **options).select(features, index, given)

    some = torch.arange(M) % 3
    expected = selected(some, some[index], same_camera_penalty=0.0)
    one = torch.zeros(M, dtype=torch.int64)
    unknown = torch.full((M,), -1)
    for known, given in (
        (None, None),
        (one, one[:5]),
        (unknown, unknown[:5]),
        (some, None),
    ):
        found = selected(known, given, same_camera_penalty=1.0)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    moved = selected(some, some[index], same_camera_penalty=4.0)[0][:, 1:]
    assert not (some[moved] == some[index][:, None]).any()  # the term has an effect


def test_preparing_again_without_cameras_clears_them() -> None:
    method = make_method(camids=torch.arange(M) % 3)
    assert (
        "same_camera_neighbors"
        in (step(method, torch.tensor([1])), method.diagnostics())[1]
    )
    method.prepare(embeddings_of(M, seed=0), None)
    assert "same_camera_neighbors" not in method.diagnostics()


# --- edges ---


@pytest.mark.parametrize(
    ("num_images", "shape"),
    [(1, (1, 0)), (2, (2, 0)), (4, (4, 0)), (7, (4, 3)), (12, (4, 8))],
)
def test_small_sets_clamp_the_counts_and_warn_once(
    num_images: int, shape: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    _warn_clamped.cache_clear()
    method = make_method(num_images)
    index = torch.tensor([0, num_images - 1])
    with caplog.at_level(logging.WARNING, logger="selcon_plugin.selection"):
        for seed in range(3):
            assert step(method, index, seed=seed).isfinite()
    assert len(caplog.records) == (num_images < 12)
    positives, negatives = method.select(embeddings_of(2, seed=1), index, None)[:2]
    assert (positives.shape[1], negatives.shape[1]) == shape
    method.start_epoch(0)
    assert step(method, index).isfinite()


@pytest.mark.parametrize(
    "options",
    [
        {"num_neighbors": 0},
        {"mixture_update": "self"},
        {"normalize_parts": True},
        {"bank_dtype": "float16"},
        {"bank_dtype": "bfloat16"},
        {"self_weight": 1.0},
        {"bank_momentum": 0.0},
    ],
)
def test_every_variant_trains_and_keeps_unit_rows(options: dict[str, Any]) -> None:
    method = make_method(**options)
    tolerance = 1e-6 if "bank_dtype" not in options else 1e-2
    for seed, rows in enumerate(
        [[1, 2, 3, 4], [5, 5, 6, 1], [7]]
    ):  # one row twice, and the last one
        assert step(method, torch.tensor(rows), seed=seed).isfinite()
    for name, bank in method.memory.named_buffers():
        lengths = bank.float().norm(dim=-1)
        assert ((lengths - 1).abs() < tolerance).all(), name


def test_no_neighbors_equals_hard_instance_discrimination() -> None:
    method = make_method(num_neighbors=0, self_weight=1.0, parts=False)
    features, index = embeddings_of(2, seed=1, parts=False), torch.tensor([3, 8])
    positives, negatives = method.select(features, index, None)[:2]
    assert positives.tolist() == [[3], [8]]
    rows = method.memory.mixture_bank[torch.cat([positives, negatives], dim=1)]
    logits = (rows @ features.global_features[:, :, None])[..., 0] / 0.1
    expected = F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(method.loss(features, index, None)["loss_global"], expected)


def test_own_row_only_update_leaves_the_neighbors_mixture_rows() -> None:
    method = make_method(mixture_update="self")
    before = method.memory.mixture_bank.clone()
    step(method, torch.tensor([4, 9]))
    rows = (method.memory.mixture_bank != before).any(dim=1).nonzero().flatten()
    assert rows.tolist() == [4, 9]


def test_global_only() -> None:
    method = make_method(parts=False, camids=torch.arange(M) % 3)
    assert method.memory.part_bank is None
    features, index = embeddings_of(3, seed=1, parts=False), torch.tensor([4, 9, 0])
    assert set(method.loss(features, index, index % 3)) == {"loss_global"}
    distance = fused_distance(
        features.global_features,
        None,
        index % 3,
        method.memory.global_bank,
        None,
        torch.arange(M) % 3,
    )
    for own, row, positives in zip(
        index, distance, method.select(features, index, index % 3)[0], strict=True
    ):
        ranked = [j for j in row.argsort().tolist() if j != own]
        assert positives.tolist() == [own.item(), *ranked[:3]]
    method.update(index, features)
    assert method.step == 1


def test_duplicate_images_are_each_others_neighbors() -> None:
    features = embeddings_of(M, seed=0)
    assert features.part_features is not None
    for bank in features:
        bank[1] = bank[0]  # type: ignore[index]
    method = make_method()
    method.prepare(features, None)
    two = Embeddings(features.global_features[:2], features.part_features[:2])
    positives, negatives = method.select(two, torch.tensor([0, 1]), None)[:2]
    assert positives[:, :2].tolist() == [[0, 1], [1, 0]]
    assert not (negatives < 2).any()


def test_autocast_gives_the_same_step() -> None:
    index = torch.tensor([4, 9, 0])
    plain, cast = make_method(), make_method()
    expected = step(plain, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(cast, index)
    assert torch.equal(found, expected)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(cast.state_dict()[name], tensor), name


# --- state ---


def test_all_buffers_except_derived_weights_are_persistent() -> None:
    method = make_method()
    missing = {name for name, _ in method.named_buffers()} - set(method.state_dict())
    assert missing == {"criterion.weights"}
    # No other attribute of the method is a tensor that changes.
    loose = [name for name, value in vars(method).items() if isinstance(value, Tensor)]
    assert loose == []


class ToyTrainer:
    """A linear embedding trained by a method and SGD with momentum on fixed inputs."""

    steps_per_epoch = 2

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = nn.Linear(6, 2 * C)
        self.method = build_method("SelectiveContrastive", M, C, S, D, **OPTIONS)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        self.images = units(M, 6, seed=11)
        self.camids = torch.arange(M) % 3

    def embed(self, images: Tensor) -> Embeddings:
        whole, parts = self.network(images).split(C, dim=1)
        return Embeddings(
            F.normalize(whole, dim=1), F.normalize(parts.reshape(-1, S, D), dim=2)
        )

    def run(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.method.start_epoch(number // self.steps_per_epoch)
            generator = torch.Generator().manual_seed(number)
            index = torch.randint(0, M, (6,), generator=generator)
            embeddings = self.embed(self.images[index])
            losses = self.method.loss(embeddings, index, self.camids[index])
            self.optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.method.update(index, embeddings)

    def prepare(self) -> None:
        with torch.no_grad():
            self.method.prepare(self.embed(self.images), self.camids)

    def state(self) -> dict[str, Any]:
        parts = {
            "network": self.network,
            "method": self.method,
            "optimizer": self.optimizer,
        }
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("saved_after", [1, 2, 3, 5])  # warm-up ends after step 2
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(saved_after: int) -> None:
    unbroken = ToyTrainer(seed=0)
    unbroken.prepare()
    unbroken.run(0, 6)

    first = ToyTrainer(seed=0)
    first.prepare()
    first.run(0, saved_after)
    resumed = ToyTrainer(seed=1)  # other weights and empty banks: the state restores all
    resumed.load(first.state())
    assert (resumed.method.step, resumed.method.prepared) == (saved_after, True)
    assert resumed.method.epoch == (saved_after - 1) // 2
    resumed.run(saved_after, 6)

    expected, found = unbroken.state(), resumed.state()
    for part in ("network", "method"):
        for name, tensor in expected[part].items():
            assert torch.equal(found[part][name], tensor), f"{part}.{name}"
    assert resumed.method.step == 6


# --- behavior ---


class ToyPersons:
    """Three identities as Gaussian clusters with noise dimensions and a camera offset."""

    num_identities, per_identity, dim = 3, 20, 24

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        count = self.num_identities * self.per_identity
        self.identities = torch.arange(count) % self.num_identities
        self.camids = torch.arange(count) // self.num_identities % 2
        centers = 0.7 * torch.randn(self.num_identities, self.dim, generator=generator)
        cameras = 1.5 * torch.randn(2, self.dim, generator=generator)
        noise = torch.randn(count, self.dim, generator=generator)
        self.images = centers[self.identities] + cameras[self.camids] + noise


def test_twenty_steps_decrease_the_loss_and_find_true_neighbors() -> None:
    data = ToyPersons()
    count = len(data.images)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(data.dim, 32), nn.ReLU(), nn.Linear(32, 2 * C))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    method = build_method(
        "SelectiveContrastive",
        count,
        C,
        S,
        D,
        num_neighbors=4,
        num_negatives=30,
        warmup_epochs=1,
    )

    def embed(images: Tensor) -> Embeddings:
        whole, parts = network(images).split(C, dim=1)
        return Embeddings(
            F.normalize(whole, dim=1), F.normalize(parts.reshape(-1, S, D), dim=2)
        )

    def neighbor_precision() -> float:
        with torch.no_grad():
            features = embed(data.images)
            distance = fused_distance(*features, None, *features, None)  # type: ignore[arg-type]
        distance.fill_diagonal_(float("inf"))
        nearest = distance.topk(4, largest=False).indices
        return (data.identities[nearest] == data.identities[:, None]).float().mean().item()

    with torch.no_grad():
        method.prepare(embed(data.images), data.camids)
    before = neighbor_precision()
    history = []
    for number in range(25):  # five steps of warm-up, then twenty
        method.start_epoch(number // 5)
        generator = torch.Generator().manual_seed(number)
        index = torch.randperm(count, generator=generator)[:20]
        embeddings = embed(data.images[index])
        losses = method.loss(embeddings, index, data.camids[index])
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        method.update(index, embeddings)
        history.append(loss.item())
    trained = history[5:]
    assert sum(trained[-3:]) < 0.8 * sum(trained[:3])
    chance = (data.per_identity - 1) / (count - 1)
    after = neighbor_precision()
    assert after > before + 0.1
    assert after > 2 * chance


# --- diagnostics ---


def test_diagnostics_report_the_last_batch() -> None:
    camids = torch.arange(M) % 3
    method = make_method(camids=camids)
    assert method.diagnostics() == {}
    assert method.selected_positives() is None
    index = torch.tensor([4, 9, 0])
    step(method, index, camids[index])
    selected = method.selected_positives()
    assert selected is not None
    anchors, neighbors = selected
    assert torch.equal(anchors, index)
    report = method.diagnostics()
    bank, mixture = method.memory.global_bank, method.memory.mixture_bank
    agreement = [float(bank[i] @ mixture[i]) for i in index.tolist()]
    assert report["bank_agreement"] == pytest.approx(sum(agreement) / 3, abs=1e-6)
    pairs = [(i, j) for i, js in zip(index.tolist(), neighbors.tolist()) for j in js]  # noqa: B905
    similarity = [float(bank[i] @ bank[j]) for i, j in pairs]
    assert report["neighbor_similarity"] == pytest.approx(sum(similarity) / 9, abs=1e-6)
    same = [i % 3 == j % 3 for i, j in pairs]
    assert report["same_camera_neighbors"] == pytest.approx(sum(same) / 9)

"""Tests of all registered methods; this file is also the program of two processes.

Every registered method is tested. CASES lists a method again for each relevant form or
switch, and with the options that it requires.
"""

from __future__ import annotations

import copy
import functools
import io
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from helpers.ddp import join_group, run_ranks, saved_by_ranks
from helpers.features import units
from selcon_plugin.clustering import (
    EnsembleLabeler,
    PseudoLabels,
    label_images,
)
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method, build_method, method_class, method_names

SELECTIVE = {"num_neighbors": 3, "num_negatives": 8}
CASES: dict[str, dict[str, Any]] = {name: {} for name in method_names()} | {
    "SelectiveContrastive": SELECTIVE | {"warmup_epochs": 1},
    "SelectiveContrastive, jaccard": SELECTIVE | {"selection": "jaccard"},
    "SelConCluster": SELECTIVE,
    "ClusterContrast, hard": {"cluster_update": "hard", "camera_weight": "batch"},
    "HHCL, instances": {"form": "instances", "instance_slots": 3},
    "DCMIP": {"instance_epoch": 6, "instance_slots": 3},
}

M, C, S = 40, 16, 2
CAMIDS = torch.arange(M) % 3
EPOCHS = (0, 6)  # the second is later than any usual warm-up
# In the first epoch, images 0..34 show five persons, and the last five are outliers.
BATCHES = (
    [0, 1, 2, 7, 8, 9, 35, 36],
    [14, 15, 16, 21, 22, 23, 28, 30],
    [3, 4, 37, 38, 10, 11, 12, 0],
    [5, 6, 6, 29, 17, 18, 39, 35],
)
every_case = pytest.mark.parametrize("case", CASES)


def embeddings_of(method: Method, count: int, *, seed: int) -> Embeddings:
    parts = units(count, S, C // S, seed=seed + 10_000) if method.uses_parts else None
    return Embeddings(units(count, C, seed=seed), parts)


@functools.cache
def people(epoch: int) -> Tensor:
    """Return features of five persons (four in a later epoch) and of some outliers."""
    images_each = 7 if epoch == 0 else 9
    person = torch.arange(M).clamp(max=35) // images_each
    own = F.normalize(units(M, C, seed=epoch) + 3 * units(M, C, seed=9)[person], dim=1)
    return torch.where((torch.arange(M) >= 36)[:, None], units(M, C, seed=epoch + 1), own)


@functools.cache
def clusters(epoch: int) -> PseudoLabels:
    """Return labels with all optional outputs: distances and several clusterings."""
    labeler = EnsembleLabeler(eps=0.6, min_samples=3, k1=6, k2=2)
    found = label_images(labeler, people(epoch), CAMIDS)
    assert found.num_clusters >= 4, found.labels
    assert found.num_outliers >= 2, found.labels
    return found


def build(case: str) -> Method:
    name = case.partition(",")[0]
    parts = (S, C // S) if method_class(name).uses_parts else (0, 0)
    return build_method(name, M, C, *parts, **CASES[case])


def begin_epoch(method: Method, epoch: int, labels: PseudoLabels | None = None) -> None:
    """Prepare a method for an epoch as the engine does."""
    method.start_epoch(epoch)
    if method.prepared and not method.needs_clusters:
        return
    own = method.clustering_features()
    embeddings = Embeddings(people(epoch), embeddings_of(method, M, seed=7).part_features)
    if own is not None:
        embeddings = Embeddings(own)
    labels = clusters(epoch) if labels is None else labels
    method.prepare(embeddings, CAMIDS, labels if method.needs_clusters else None)


def prepared(case: str, epoch: int = 0, labels: PseudoLabels | None = None) -> Method:
    method = build(case)
    method.check_cameras(CAMIDS)
    begin_epoch(method, epoch, labels)
    return method


def cut(embeddings: Embeddings, rows: Tensor) -> Embeddings:
    parts = embeddings.part_features
    return Embeddings(
        embeddings.global_features[rows], None if parts is None else parts[rows]
    )


def batch_of(
    method: Method, number: int, rows: Tensor | None = None
) -> tuple[Tensor, Embeddings, list[Embeddings]]:
    """Return index, features and views of a batch, or of some of its rows."""
    index = torch.tensor(BATCHES[number % len(BATCHES)])
    rows = torch.arange(len(index)) if rows is None else rows
    num_views = len(method.make_views(torch.rand(2, 3, 8, 4) * 255))
    features, *views = (
        cut(embeddings_of(method, len(index), seed=100 * number + view), rows)
        for view in range(1 + num_views)
    )
    return index[rows], features, views


def step(method: Method, number: int, rows: Tensor | None = None) -> Tensor:
    index, features, views = batch_of(method, number, rows)
    losses = method.loss(features, index, CAMIDS[index], *views)
    assert losses, "a method returns at least one loss"
    assert all(loss.shape == () for loss in losses.values()), "losses are scalars"
    method.update(index, features)
    return torch.stack(list(losses.values())).sum()


def copy_of_state(method: Method) -> dict[str, Tensor]:
    return copy.deepcopy(dict(method.state_dict()))


def assert_finite(method: Method) -> None:
    for name, tensor in method.state_dict().items():
        assert torch.isfinite(tensor).all(), f"{name} is not finite"


def assert_close_states(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_case_is_a_method() -> None:
    assert {case.partition(",")[0] for case in CASES} == set(method_names())


# There are two epochs of four steps. The first interruption is before the second
# clustering, the others after it.
@every_case
@pytest.mark.parametrize("steps_before", [2, 4, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(case: str, steps_before: int) -> None:
    unbroken, broken = prepared(case), prepared(case)
    for number in range(8):
        if number == steps_before:
            stream = io.BytesIO()
            torch.save(broken.state_dict(), stream)
            stream.seek(0)
            broken = build(case)
            broken.load_state_dict(torch.load(stream, weights_only=True))
        if number == 4:
            begin_epoch(unbroken, EPOCHS[1])
            begin_epoch(broken, EPOCHS[1])
        assert torch.equal(step(unbroken, number), step(broken, number)), f"step {number}"
    state = broken.state_dict()
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} is not as in the unbroken run"


@every_case
def test_loss_reads_and_update_writes(case: str) -> None:
    method = prepared(case, EPOCHS[1])
    assert not list(method.parameters()), "the state of a method is buffers"
    for number in range(2):
        index, features, views = batch_of(method, number)
        leaves = [t.requires_grad_() for t in features if t is not None]
        before = {name: buffer.clone() for name, buffer in method.named_buffers()}
        losses = method.loss(features, index, CAMIDS[index], *views)
        torch.stack(list(losses.values())).sum().backward()
        for name, buffer in method.named_buffers():
            assert torch.equal(buffer, before[name]), f"loss() wrote {name}"
        method.update(index, features)
        written = {n for n, b in method.named_buffers() if not torch.equal(b, before[n])}
        assert "_step" in written, "update() ends with self._finish_update()"
        assert written - {"_step"}, "update() wrote no bank"
    for leaf, kind in zip(leaves, ("global", "part"), strict=False):  # no bank is empty now
        learned = leaf.grad is not None and bool(leaf.grad.any())
        assert learned, f"{kind} features get no gradient; uses_parts = False for no parts"
    assert not any(buffer.requires_grad for buffer in method.buffers())


def assert_same_up_to_numbering(name: str, found: Tensor, wanted: Tensor) -> None:
    """Compare banks regardless of the order of rows; skip integers, which may be labels."""
    assert found.shape == wanted.shape, name
    if not found.dtype.is_floating_point or not found.numel():
        return
    distance = torch.cdist(
        found.double().reshape(len(found), -1), wanted.double().reshape(len(wanted), -1)
    )
    for nearest in (distance.amin(dim=0), distance.amin(dim=1)):
        assert nearest.max() < 1e-5, f"{name} has other rows under other names"


@every_case
def test_numbering_of_clusters_does_not_matter(case: str) -> None:
    labels = clusters(0)
    names = (torch.arange(labels.num_clusters) + 2) % labels.num_clusters
    renamed = torch.where(labels.labels < 0, -1, names[labels.labels])
    method = prepared(case, labels=labels)
    other = prepared(case, labels=replace(labels, labels=renamed))
    for number in range(4):
        torch.testing.assert_close(step(other, number), step(method, number))
    found = other.state_dict()
    for name, tensor in method.state_dict().items():
        assert_same_up_to_numbering(name, found[name], tensor)
    if method.needs_clusters:
        assert torch.equal(other.labels, renamed)


@every_case
def test_micro_batches_write_the_same_as_the_batch(case: str) -> None:
    whole, cut_up = prepared(case, EPOCHS[1]), prepared(case, EPOCHS[1])
    for number in range(3):
        step(whole, number)
        parts = []
        for rows in torch.arange(len(BATCHES[0])).chunk(2):
            index, features, views = batch_of(cut_up, number, rows)
            cut_up.loss(features, index, CAMIDS[index], *views)
            parts.append((index, features))
        index = torch.cat([index for index, _ in parts])
        cut_up.update(index, Embeddings.cat([features for _, features in parts]))
    assert_close_states(copy_of_state(cut_up), copy_of_state(whole))


@every_case
def test_instance_level_labels(case: str) -> None:
    """Use the labels with which the engine replaces too few clusters."""
    labeler = EnsembleLabeler(eps=0.6, min_samples=3, k1=6, k2=2)
    singletons = label_images(labeler, people(0), CAMIDS, min_clusters=M)
    assert singletons.instance_level
    method = prepared(case, labels=singletons)
    for number in range(2):
        assert torch.isfinite(step(method, number))
    assert_finite(method)
    begin_epoch(method, EPOCHS[1])  # and back to clusters
    assert torch.isfinite(step(method, 2))
    assert_finite(method)


@every_case
def test_batch_of_outliers_only(case: str) -> None:
    method = prepared(case, EPOCHS[1])
    outliers = (clusters(EPOCHS[1]).labels < 0).nonzero().flatten()
    features, *views = (
        embeddings_of(method, len(outliers), seed=5 + view)
        for view in range(1 + len(method.make_views(torch.rand(2, 3, 8, 4) * 255)))
    )
    leaf = features.global_features.requires_grad_()
    losses = method.loss(features, outliers, CAMIDS[outliers], *views)
    loss = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(loss)
    loss.backward()  # even where there is nothing to learn
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    method.update(outliers, features)
    assert_finite(method)


@every_case
def test_losses_are_finite_in_half_precision(case: str) -> None:
    method = prepared(case, EPOCHS[1])
    types = {name: buffer.dtype for name, buffer in method.named_buffers()}
    index, features, views = batch_of(method, 0)
    leaf = features.global_features.bfloat16().requires_grad_()
    parts = features.part_features
    half = Embeddings(leaf, None if parts is None else parts.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method.loss(half, index, CAMIDS[index], *views)
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
        assert loss.dtype == torch.float32, f"{name} is {loss.dtype}: of too few digits"
    torch.stack(list(losses.values())).sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    method.update(index, half)
    assert_finite(method)
    assert {name: buffer.dtype for name, buffer in method.named_buffers()} == types


def train(case: str, process: int, num_processes: int) -> dict[str, Tensor]:
    """Train two epochs on this process's rows of every batch, and return the state."""
    method = prepared(case)
    for number in range(8):
        if number == 4:
            begin_epoch(method, EPOCHS[1])
        rows = torch.arange(len(BATCHES[0])).tensor_split(num_processes)[process]
        step(method, number, rows)
    return copy_of_state(method)


def work(process: int, folder: Path) -> None:
    """Run all cases in one of two processes; the tests report failures."""
    join_group(process, folder)
    results: dict[str, Any] = {}
    for case in CASES:
        try:
            results[case] = train(case, process, 2)
        except Exception:
            # The other process may be waiting for this one, so neither can continue.
            results[case] = traceback.format_exc()
            break
    torch.save(results, folder / f"{process}.pt")
    if len(results) == len(CASES):
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(__file__, folder)
    return saved_by_ranks(folder)


@every_case
def test_two_processes_have_the_banks_of_one(
    case: str, two_ranks: list[dict[str, Any]]
) -> None:
    states = []
    for process, results in enumerate(two_ranks):
        state = results.get(case, f"not reached: {list(results)[-1]} failed before")
        assert isinstance(state, dict), f"process {process}: {state}"
        states.append(state)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), f"{name} differs between processes"
    assert_close_states(states[0], train(case, 0, 1))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

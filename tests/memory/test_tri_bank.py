from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.tri_bank import TriBankMemory
from selcon_plugin.memory.writes import write_rows

M, B, K, S, D = 12, 6, 3, 2, 4
C = S * D


def write(bank: Tensor, row: int, feature: Tensor, momentum: float) -> None:
    mixed = momentum * bank[row] + (1 - momentum) * feature
    bank[row] = mixed / mixed.norm(dim=-1, keepdim=True)


def filled_memory(**options: object) -> TriBankMemory:
    memory = TriBankMemory(M, C, S, D, **options)  # type: ignore[arg-type]
    memory.initialize(units(M, C, seed=0), units(M, S, D, seed=1))
    memory.mixture_bank.copy_(units(M, C, seed=2))
    return memory


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an index with a repeated row, features, and overlapping positives."""
    index = torch.tensor([4, 0, 7, 4, 11, 1])
    positives = torch.tensor(
        [
            [4, 0, 7, 2],
            [0, 4, 1, 2],
            [7, 4, 2, 0],
            [4, 1, 7, 9],
            [11, 4, 0, 3],
            [1, 0, 4, 7],
        ]
    )
    return index, units(B, C, seed=3), units(B, S, D, seed=4), positives


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.5, 0.9])
def test_write_rows_equals_a_loop_over_the_writes(momentum: float, device: str) -> None:
    rows = torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(0))
    source = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(1))
    features = units(5, 2, 6, seed=2)
    bank = units(9, 2, 6, seed=3)
    expected = bank.clone()
    for row, position in zip(rows.tolist(), source.tolist(), strict=True):
        write(expected, row, features[position], momentum)
    found = bank.to(device)
    write_rows(
        found, rows.to(device), features.to(device), source.to(device), momentum=momentum
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found.cpu()[7:], bank[7:])  # other rows are bit-identical


def test_write_rows_without_writes_changes_nothing() -> None:
    bank = units(3, 4, seed=0)
    before = bank.clone()
    nothing = torch.empty(0, dtype=torch.int64)
    write_rows(bank, nothing, units(2, 4, seed=1), nothing, momentum=0.5)
    assert torch.equal(bank, before)


def update_by_loops(
    memory: TriBankMemory, batch: tuple[Tensor, Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    index, global_features, part_features, positives = batch
    banks = {name: bank.clone() for name, bank in memory.named_buffers()}
    for i, own in enumerate(index.tolist()):
        write(banks["global_bank"], own, global_features[i], memory.momentum)
        for s in range(S):
            write(banks["part_bank"][:, s], own, part_features[i, s], memory.momentum)
    joined = part_features.reshape(B, C)  # norm sqrt(S)
    if memory.normalize_parts:
        joined = joined / joined.norm(dim=1, keepdim=True)
    columns = positives if memory.mixture_update == "positives" else index[:, None]
    for view in (joined, global_features):
        for column in reversed(range(columns.shape[1])):
            for i in range(B):
                row = int(columns[i, column])
                write(banks["mixture_bank"], row, view[i], memory.momentum)
    return banks


@pytest.mark.parametrize("mixture_update", ["positives", "self"])
@pytest.mark.parametrize("normalize_parts", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_update_equals_definition_by_loops(
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    mixture_update: str,
    normalize_parts: bool,
    momentum: float,
) -> None:
    memory = filled_memory(
        mixture_update=mixture_update, normalize_parts=normalize_parts, momentum=momentum
    )
    expected = update_by_loops(memory, batch)
    inputs = [tensor.clone() for tensor in batch]
    memory.update(*batch)
    for name, bank in memory.named_buffers():
        torch.testing.assert_close(bank, expected[name], rtol=0, atol=1e-6)
        assert not bank.requires_grad
    for tensor, before in zip(batch, inputs, strict=True):
        assert torch.equal(tensor, before)


def test_update_without_parts_writes_global_and_mixture_bank(
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    index, features, _, positives = batch
    memory = TriBankMemory(M, C, 0, 0)
    assert memory.part_bank is None
    memory.initialize(units(M, C, seed=0), None)
    expected = memory.mixture_bank.clone()
    for column in reversed(range(1 + K)):
        for i in range(B):
            write(expected, int(positives[i, column]), features[i], 0.5)
    memory.update(index, features, None, positives)
    torch.testing.assert_close(memory.mixture_bank, expected, rtol=0, atol=1e-6)


def test_first_write_of_an_empty_mixture_row_is_the_feature() -> None:
    memory = TriBankMemory(M, C, 0, 0)
    features = units(1, C, seed=0)
    memory.update(torch.tensor([5]), features, None, torch.tensor([[5]]))
    torch.testing.assert_close(memory.mixture_bank[5], features[0])
    assert memory.mixture_bank.count_nonzero(dim=1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_banks_stay_close_to_float32(
    batch: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    full, half = filled_memory(), filled_memory(dtype=dtype)
    full.update(*batch)
    half.update(*batch)
    # A row is rounded at every write, here up to 13 times.
    tolerance = 10 * torch.finfo(dtype).eps
    for name, bank in half.named_buffers():
        assert bank.dtype == dtype
        torch.testing.assert_close(
            bank.float(), full.get_buffer(name), rtol=0, atol=tolerance
        )


def test_initialize_fills_ranking_banks_and_empties_the_mixture_bank() -> None:
    memory = filled_memory()
    memory.initialize(units(M, C, seed=5), units(M, S, D, seed=6))
    assert torch.equal(memory.global_bank, units(M, C, seed=5))
    assert memory.part_bank is not None
    assert torch.equal(memory.part_bank, units(M, S, D, seed=6))
    assert not memory.mixture_bank.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TriBankMemory(M, 9, S, D), r"2 x 4.*the global feature \(9\)"),
        (lambda: TriBankMemory(M, C, S, D, momentum=1.5), r"momentum .*\[0, 1\], got 1.5"),
        (
            lambda: TriBankMemory(M, C, S, D, mixture_update="all"),  # type: ignore[arg-type]
            "'positives' or 'self', got 'all'",
        ),
        (
            lambda: filled_memory().initialize(units(M - 1, C, seed=0), None),
            r"global features must be \(12, 8\), got \(11, 8\)",
        ),
        (
            lambda: filled_memory().initialize(units(M, C, seed=0), None),
            r"part features must be \(12, 2, 4\), got None",
        ),
    ],
)
def test_wrong_arguments_are_reported(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_banks_are_persistent_and_restored_from_a_checkpoint() -> None:
    memory = filled_memory()
    state = memory.state_dict()
    assert set(state) == {"global_bank", "part_bank", "mixture_bank"}
    fresh = TriBankMemory(M, C, S, D)
    fresh.load_state_dict(state)
    for name, bank in memory.named_buffers():
        assert torch.equal(fresh.get_buffer(name), bank)


def test_instance_memory_writes_the_own_rows_in_batch_order(device: str) -> None:
    memory = InstanceMemory(M, C, momentum=0.2).to(device)
    features = 3.0 * units(M, C, seed=0)
    memory.fill(features.to(device))
    expected = F.normalize(features, dim=1)
    assert torch.allclose(memory.bank.cpu(), expected)
    index, batch = torch.tensor([4, 0, 4, 4]), units(4, C, seed=1)
    for row, feature in zip(index.tolist(), batch, strict=True):
        write(expected, row, feature, 0.2)
    memory.update(index.to(device), 5.0 * batch.to(device))
    assert torch.allclose(memory.bank.cpu(), expected, atol=1e-6)


def test_instance_memory_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"momentum .*\[0, 1\].*got 1.5"):
        InstanceMemory(M, C, momentum=1.5)
    with pytest.raises(ValueError, match=rf"features must be \({M}, {C}\), got \(3, {C}\)"):
        InstanceMemory(M, C).fill(units(3, C, seed=0))

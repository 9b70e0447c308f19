"""Two real processes with the gloo backend; this file is also the program they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from helpers.ddp import join_group, run_ranks, saved_by_ranks
from selcon_plugin.distributed import gather_batch, gather_values, rank, world_size
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import build_method
from selcon_plugin.methods.selective_contrastive import SelectiveContrastive

NUM_IMAGES, DIM, NUM_PARTS, PART_DIM = 24, 8, 2, 4
# Two steps in warm-up, two after it; the last is odd: rank 1 has one image fewer.
BATCHES = ([3, 9, 4, 20], [1, 5, 9, 9], [0, 23, 11, 3], [7, 2, 13])
WARMUP_STEPS = 2


def features_of(generator: torch.Generator, count: int) -> Embeddings:
    features = torch.randn(count, DIM, generator=generator)
    parts = torch.randn(count, NUM_PARTS, PART_DIM, generator=generator)
    return Embeddings(F.normalize(features, dim=1), F.normalize(parts, dim=2))


def train(process: int, num_processes: int) -> dict[str, torch.Tensor]:
    """Train four steps on this process's shard of every batch; return the state."""
    generator = torch.Generator().manual_seed(0)
    method = build_method(
        "SelectiveContrastive",
        NUM_IMAGES,
        DIM,
        NUM_PARTS,
        PART_DIM,
        num_neighbors=3,
        num_negatives=6,
        warmup_epochs=1,
    )
    assert isinstance(method, SelectiveContrastive)
    camids = torch.arange(NUM_IMAGES) % 3
    method.prepare(features_of(generator, NUM_IMAGES), camids)
    for step, rows in enumerate(BATCHES):
        method.start_epoch(step // WARMUP_STEPS)
        whole = features_of(generator, len(rows))
        assert whole.part_features is not None
        shard = torch.arange(len(rows)).tensor_split(num_processes)[process]
        index = torch.tensor(rows)[shard]
        embeddings = Embeddings(whole.global_features[shard], whole.part_features[shard])
        method.loss(embeddings, index, camids[index])
        method.update(index, embeddings)
    return method.state_dict()


def work(process: int, folder: Path) -> None:
    join_group(process, folder)
    numbers = torch.arange(12.0).reshape(6, 2)
    results: dict[str, Any] = {
        "world": (rank(), world_size()),
        "even": gather_batch(numbers.tensor_split([3])[process]),
        "first longer": gather_batch(numbers.tensor_split([4])[process]),
        "last longer": gather_batch(numbers.tensor_split([1])[process]),
        "first empty": gather_batch(numbers.tensor_split([0])[process]),
        "last empty": gather_batch(numbers.tensor_split([6])[process]),
        "both empty": gather_batch(numbers[:0]),
        "integers": gather_batch(torch.arange(7).tensor_split([4])[process]),
        "values": gather_values({"rank": process, "names": ["\udce9" * process, "b"]}),
        "state": train(process, 2),
    }
    torch.save(results, folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(__file__, folder)
    return saved_by_ranks(folder)


def test_single_process_needs_no_communication() -> None:
    batch = torch.arange(4)
    assert (rank(), world_size()) == (0, 1)
    assert gather_batch(batch) is batch


def test_gathered_batch_is_the_ranks_slices_in_order(
    two_ranks: list[dict[str, Any]],
) -> None:
    numbers = torch.arange(12.0).reshape(6, 2)
    for process, results in enumerate(two_ranks):
        assert results["world"] == (process, 2)
        for name in ("even", "first longer", "last longer", "first empty", "last empty"):
            assert torch.equal(results[name], numbers), name
        assert results["both empty"].shape == (0, 2)
        assert torch.equal(results["integers"], torch.arange(7))
        assert results["values"] == [
            {"rank": 0, "names": ["", "b"]},
            {"rank": 1, "names": ["\udce9", "b"]},
        ]


def test_two_ranks_hold_the_banks_of_one_process(two_ranks: list[dict[str, Any]]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = train(0, 1)
    torch.set_num_threads(threads)
    assert expected["memory.mixture_bank"].any()
    for results in two_ranks:
        assert results["state"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(results["state"][name], tensor), name


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

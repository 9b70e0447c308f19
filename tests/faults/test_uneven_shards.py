"""Three gloo processes with uneven, partly empty shards; this file is their program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.ddp import join_group, run_ranks, saved_by_ranks
from selcon_plugin.distributed import rank
from selcon_plugin.engine.extraction import extract_embeddings
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.features import GlobalPartEmbedding
from selcon_plugin.losses.camera_weights import CameraWeighting, camera_entropy_weights
from selcon_plugin.models.preprocessing import Preprocessing

NUM_PROCESSES = 3
# Images of a data set, and their split over three ranks by FastReID's sampler.
SHARDS = {1: (1, 0, 0), 2: (1, 1, 0), 4: (2, 2, 0), 7: (3, 3, 1)}
# A batch, and the rows of each rank.
TARGETS, CAMIDS = torch.tensor([0, 0, 1, -1, 1, 0]), torch.tensor([0, 1, 2, 0, 2, -1])
BATCH_SHARDS = {"even": (2, 2, 2), "uneven": (3, 1, 2), "empty": (0, 4, 2)}


def network(num_parts: int) -> EmbeddingNetwork:
    torch.manual_seed(0)
    head = GlobalPartEmbedding(6, embedding_dim=8, num_parts=num_parts)
    return EmbeddingNetwork(
        nn.Conv2d(3, 6, 3, padding=1),
        head,
        Preprocessing(pixel_mean=(0.0,) * 3, pixel_std=(255.0,) * 3),
        images_normalized=False,
    ).train()


def extracted(num_images: int, num_parts: int, shard: slice) -> dict[str, Any]:
    images = torch.rand(num_images, 3, 8, 4, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(num_images)[shard]
    batches = [(255 * images[part], part) for part in rows.split(2) if len(part)]
    net = network(num_parts)
    found = extract_embeddings(net, batches, num_images)
    assert net.training
    return {"global": found.global_features, "parts": found.part_features}


def shard_of(process: int, shards: tuple[int, ...]) -> slice:
    first = sum(shards[:process])
    return slice(first, first + shards[process])


def batch_weights(shard: slice) -> Tensor | None:
    weighting = CameraWeighting(len(TARGETS), "batch")
    return weighting(torch.arange(len(TARGETS))[shard], TARGETS[shard], CAMIDS[shard])


def work(process: int, folder: Path) -> None:
    join_group(process, folder, NUM_PROCESSES)
    results: dict[str, Any] = {
        f"extraction {num_images} {num_parts}": extracted(
            num_images, num_parts, shard_of(rank(), shards)
        )
        for num_images, shards in SHARDS.items()
        for num_parts in (0, 2)
    }
    for name, shards in BATCH_SHARDS.items():
        results[name] = batch_weights(shard_of(process, shards))
    torch.save(results, folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(__file__, folder, NUM_PROCESSES)
    return saved_by_ranks(folder, NUM_PROCESSES)


@pytest.mark.parametrize("num_parts", [0, 2])
@pytest.mark.parametrize("num_images", SHARDS)
def test_extraction_with_uneven_and_empty_shards_is_that_of_one_process(
    ranks: list[dict[str, Any]], num_images: int, num_parts: int
) -> None:
    expected = extracted(num_images, num_parts, slice(None))
    assert expected["global"].norm(dim=1).min() > 0.99  # no row is missing
    assert (expected["parts"] is None) == (num_parts == 0)
    for results in ranks:
        torch.testing.assert_close(
            results[f"extraction {num_images} {num_parts}"], expected
        )


@pytest.mark.parametrize("name", BATCH_SHARDS)
def test_camera_weights_of_uneven_shards_are_those_of_the_batch(
    ranks: list[dict[str, Any]], name: str
) -> None:
    expected = camera_entropy_weights(TARGETS, CAMIDS, mode="batch")
    expected[TARGETS < 0] = 1.0  # CameraWeighting gives outliers weight 1
    assert len(expected.unique()) == 3  # otherwise a wrong slice could pass
    assert torch.equal(torch.cat([results[name] for results in ranks]), expected)
    for process, results in enumerate(ranks):
        assert len(results[name]) == BATCH_SHARDS[name][process]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

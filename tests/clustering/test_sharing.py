"""Two real processes with the gloo backend; this file is also the program they run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.sparse import csr_array

from helpers.ddp import join_group, run_ranks
from selcon_plugin.clustering import PseudoLabels, share_pseudo_labels


def cases() -> dict[str, PseudoLabels]:
    labels = torch.tensor([0, 1, -1, 0])
    graph = csr_array(np.array([[0, 0.5, 0, 0.25]] * 4, dtype=np.float32))
    labelings = torch.tensor([[0, 1, -1, 0], [0, 0, 1, 1], [-1, -1, -1, -1]])
    return {
        "labels": PseudoLabels(labels),
        "graph": PseudoLabels(labels, distance=graph),
        "labelings": PseudoLabels(labels, labelings=labelings),
        "both": PseudoLabels(labels, distance=graph, labelings=labelings),
        "each its own": PseudoLabels.each_its_own(4),
    }


def work(process: int, folder: Path) -> None:
    join_group(process, folder)
    for name, given in cases().items():
        found = share_pseudo_labels(given if process == 0 else None, torch.device("cpu"))
        assert torch.equal(found.labels, given.labels), name
        assert found.instance_level == given.instance_level, name
        assert (found.distance is None) == (given.distance is None), name
        if given.distance is not None:
            assert (found.distance.toarray() == given.distance.toarray()).all(), name
        assert (found.labelings is None) == (given.labelings is None), name
        if given.labelings is not None:
            assert found.labelings is not None
            assert torch.equal(found.labelings, given.labelings), name
    dist.destroy_process_group()


def test_every_rank_gets_the_labels_of_rank_0(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)


def test_one_process_keeps_its_labels() -> None:
    given = cases()["both"]
    assert share_pseudo_labels(given, torch.device("cpu")) is given


def test_labelings_of_other_images_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"clusterings of the 2 images, shape \(T, M\), got"
    ):
        PseudoLabels(torch.tensor([0, 1]), labelings=torch.zeros(3, 4, dtype=torch.int64))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

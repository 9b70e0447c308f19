"""Two real processes with the gloo backend; this file is also the program they run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.sparse import csr_array

from selcon_plugin.clustering import PseudoLabels, share_pseudo_labels

ROOT = Path(__file__).resolve().parents[2]


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
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2
    )
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
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(process), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes the pipe of the remaining process


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

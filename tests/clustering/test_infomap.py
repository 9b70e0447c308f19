from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.clustering import InfomapLabeler, Neighbors, PseudoLabels
from selcon_plugin.clustering.infomap import infomap_labels

needs_infomap = pytest.mark.skipif(
    importlib.util.find_spec("infomap") is None, reason="infomap is not installed"
)

# Runs in a separate process, as in the labeler.
LIBRARY_CALL = """
import infomap, json, sys
network = infomap.Infomap(directed=True, two_level=True, silent=True, seed=1)
network.add_links([tuple(link) for link in json.load(sys.stdin)])
result = network.run()
modules = network.get_modules() if result is None else result.modules()
print(json.dumps({str(node): module for node, module in dict(modules).items()}))
"""


def people(num: int, images: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(num).repeat_interleave(images)
    centers = torch.randn(num, 32, generator=generator)
    features = centers[pids] + noise * torch.randn(len(pids), 32, generator=generator)
    return F.normalize(features, dim=1), pids


def cliques(sizes: list[int]) -> Neighbors:
    """Return groups in which all images are neighbors with similarity 0.9."""
    num_images, width = sum(sizes), max(sizes)
    similarity = torch.zeros(num_images, width)
    index = torch.arange(num_images)[:, None].repeat(1, width)
    start = 0
    for size in sizes:
        for i in range(size):
            others = [start + j for j in range(size) if j != i]
            index[start + i, 1:size] = torch.tensor(others)
            similarity[start + i, 1:size] = 0.9
        start += size
    return Neighbors(similarity, index)


@needs_infomap
def test_equals_the_library_on_links_made_by_loops() -> None:
    # Overlapping persons: undirected links or more than two levels give other clusters.
    features, _ = people(12, 10, noise=1.5)
    similarity = features.double() @ features.double().T
    links = []
    for i, row in enumerate(similarity.tolist()):
        others = sorted((j for j in range(len(row)) if j != i), key=lambda j: -row[j])
        links += [(i, j, row[j]) for j in others[:4] if row[j] >= 0.4]
    answer = subprocess.run(
        [sys.executable, "-c", LIBRARY_CALL],
        input=json.dumps(links),
        capture_output=True,
        text=True,
        check=True,
    )
    modules = json.loads(answer.stdout)
    labels = np.array([modules.get(str(i), -1) for i in range(len(features))])
    sizes = {label: (labels == label).sum() for label in set(labels.tolist())}
    kept = [-1 if sizes[label] < 5 else label for label in labels.tolist()]
    expected = PseudoLabels.numbered(kept)

    found = InfomapLabeler(k=5, min_similarity=0.4).cluster(features)
    assert torch.equal(found.labels, expected.labels)
    assert expected.num_clusters > 5
    assert expected.num_outliers > 0


@needs_infomap
def test_clusters_of_four_are_dropped_and_of_five_kept() -> None:
    labels = infomap_labels(cliques([5, 4, 6, 1]), min_similarity=0.5, min_cluster_size=5)
    found = PseudoLabels.numbered(labels).labels.tolist()
    assert found == [0] * 5 + [-1] * 4 + [1] * 6 + [-1]


@needs_infomap
@pytest.mark.parametrize(("limit", "clusters"), [(0.9, 1), (0.91, 0)])
def test_the_smallest_similarity_is_included(limit: float, clusters: int) -> None:
    labels = infomap_labels(cliques([6]), min_similarity=limit, min_cluster_size=5)
    assert PseudoLabels.numbered(labels).num_clusters == clusters


@needs_infomap
def test_separate_persons_are_found_beside_faiss(device: str) -> None:
    if importlib.util.find_spec("faiss"):
        import faiss  # noqa: F401  (both in one process would crash)
    features, pids = people(20, 12, noise=0.3)
    labeler = InfomapLabeler()
    first, second = labeler(features.to(device)), labeler(features.to(device))
    assert torch.equal(first.labels, pids)
    assert torch.equal(second.labels, first.labels)


@needs_infomap
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_few_images_are_outliers(num_images: int) -> None:
    features = F.normalize(torch.randn(num_images, 8), dim=1)
    assert InfomapLabeler()(features).labels.tolist() == [-1] * num_images


@needs_infomap
def test_identical_images_do_not_fail() -> None:
    assert InfomapLabeler()(torch.ones(40, 8)).num_images == 40


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"GPL-3.0.*-m pip install \"infomap>=2\""):
        InfomapLabeler()


@needs_infomap
def test_failure_of_the_program_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match=r"infomap failed on 20 links with exit code 1"):
        infomap_labels(cliques([5]), min_similarity=0.5, min_cluster_size=5)

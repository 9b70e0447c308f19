from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from selcon_plugin.clustering.pseudo_labels import PseudoLabels, outliers_as_singletons


def test_numbered_renames_by_first_image_and_keeps_the_partition() -> None:
    raw = np.random.default_rng(0).integers(-2, 9, 50)
    labels = PseudoLabels.numbered(raw).labels.tolist()
    names: dict[int, int] = {}
    for old, new in zip(raw.tolist(), labels, strict=True):
        assert new == (-1 if old < 0 else names.setdefault(old, len(names)))


def test_numbered_keeps_the_other_attributes() -> None:
    found = PseudoLabels.numbered([3], distance="graph", measured={"eps": 0.5})
    assert (found.distance, found.measured) == ("graph", {"eps": 0.5})


def test_counts_by_hand() -> None:
    found = PseudoLabels(torch.tensor([0, -1, 1, 0, -1, 0, 2, -1]))
    assert (found.num_images, found.num_clusters, found.num_outliers) == (8, 3, 3)
    assert found.outlier_ratio == 3 / 8
    assert found.sizes.tolist() == [3, 1, 1]
    assert not found.instance_level


@pytest.mark.parametrize(("labels", "ratio"), [([], 0.0), ([-1, -1], 1.0)])
def test_no_cluster(labels: list[int], ratio: float) -> None:
    found = PseudoLabels.numbered(labels)
    assert (found.num_clusters, found.outlier_ratio) == (0, ratio)
    assert found.sizes.tolist() == []


def test_instance_level_labels() -> None:
    found = PseudoLabels.each_its_own(3, measured={"eps": 0.1})
    assert found.labels.tolist() == [0, 1, 2]
    assert found.instance_level
    assert found.measured == {"eps": 0.1}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0]), r"int64 of shape \(M,\), got torch.float32"),
        (torch.zeros(2, 1, dtype=torch.int64), r"of shape \(2, 1\)"),
        (torch.tensor([0, 2]), "without a gap"),
        (torch.tensor([-2, 0]), "without a gap"),
    ],
)
def test_wrong_labels_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PseudoLabels(labels)


@pytest.mark.parametrize("labels", [[], [-1], [-1, 1, 0, -1, 1], [-1, -1]])
def test_outliers_as_singletons_puts_each_outlier_after_the_clusters(
    labels: list[int],
) -> None:
    expected, clusters = [], max(labels, default=-1) + 1
    for label in labels:
        expected.append(label if label >= 0 else clusters)
        clusters += label < 0
    assert outliers_as_singletons(np.array(labels, dtype=np.int64)).tolist() == expected


def test_labels_of_a_subset_extend_to_all_images():
    distance = csr_array([[0, 0.5, 0], [0.5, 0, 0.25], [0, 0.25, 0]])
    some = PseudoLabels(
        torch.tensor([0, -1, 0]),
        distance=distance,
        measured={"eps": 0.5},
        labelings=torch.tensor([[0, 0, 1], [-1, 0, 0]]),
    )
    kept = torch.tensor([False, True, True, False, True])
    found = some.among(kept)
    assert found.labels.tolist() == [-1, 0, -1, -1, 0]
    assert found.labelings.tolist() == [[-1, 0, 0, -1, 1], [-1, -1, 0, -1, 0]]
    assert found.measured == {"eps": 0.5}
    dense = np.zeros((5, 5))
    dense[np.ix_([1, 2, 4], [1, 2, 4])] = distance.toarray()
    assert np.array_equal(found.distance.toarray(), dense)
    instances = PseudoLabels.each_its_own(3).among(kept)
    assert instances.labels.tolist() == [0, 1, 2, 3, 4]
    assert instances.instance_level

from __future__ import annotations

import importlib.util
import logging
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selcon_plugin.clustering import (
    Labeler,
    PseudoLabels,
    build_labeler,
    labeler_names,
    labeler_options,
    register_labeler,
)
from selcon_plugin.options import Interval


class ByFirstAxis(Labeler):
    """Labeler with one cluster: the images whose first feature is largest."""

    def __init__(self, *, size: Annotated[int, Interval(1)] = 3) -> None:
        self.size = size
        self.seen: list[Tensor] = []

    def cluster(self, features: Tensor) -> PseudoLabels:
        self.seen.append(features)
        labels = torch.where(features[:, 0] > 0.5, 0, -1).cpu()
        return PseudoLabels.numbered(labels, measured={"found": 1.0})


class Outlier:
    """Filter that turns one image into an outlier and records its calls."""

    def __init__(self, image: int) -> None:
        self.image = image
        self.calls: list[tuple[Any, ...]] = []

    def __call__(
        self,
        pseudo_labels: PseudoLabels,
        features: Tensor,
        camids: Tensor | None,
        labeler: Labeler,
    ) -> PseudoLabels:
        self.calls.append((pseudo_labels.labels.tolist(), features, camids, labeler))
        labels = pseudo_labels.labels.clone()
        labels[self.image] = -1
        return PseudoLabels.numbered(labels, measured=pseudo_labels.measured)

    def state_dict(self) -> dict[str, Any]:
        return {"image": self.image}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.image = state.get("image", self.image)


FEATURES = torch.tensor([[3.0, 0.0], [0.0, 2.0], [5.0, 0.1], [1.0, 0.0]])


def test_features_are_normalized_and_stay_on_their_device(device: str) -> None:
    labeler = ByFirstAxis()
    given = FEATURES.to(device, torch.float64)
    before = given.clone()
    assert labeler(given).labels.tolist() == [0, -1, 0, 0]
    (seen,) = labeler.seen
    assert seen.dtype == torch.float32
    assert seen.device == given.device
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(4, device=device))
    assert torch.equal(given, before)


def test_numpy_features_and_features_with_gradient_are_accepted() -> None:
    expected = ByFirstAxis()(FEATURES).labels
    assert torch.equal(ByFirstAxis()(FEATURES.numpy()).labels, expected)
    labeler = ByFirstAxis()
    assert torch.equal(labeler(FEATURES.clone().requires_grad_()).labels, expected)
    assert not labeler.seen[0].requires_grad


def test_filters_run_in_order_and_quality_is_that_of_the_result() -> None:
    labeler = ByFirstAxis()
    first, second = Outlier(0), Outlier(2)
    labeler.filters = (first, second)
    camids = torch.tensor([0, 1, 2, -1], dtype=torch.int32)
    found = labeler(FEATURES, camids)
    assert found.labels.tolist() == [-1, -1, -1, 0]
    assert first.calls[0][0] == [0, -1, 0, 0]
    assert second.calls[0][0] == [-1, -1, 0, 0]
    _, features, seen_camids, seen_labeler = first.calls[0]
    assert features is labeler.seen[0]
    assert seen_camids.dtype == torch.int64
    assert seen_camids.tolist() == camids.tolist()
    assert seen_labeler is labeler
    assert found.measured["found"] == 1.0
    assert found.measured["outlier_ratio"] == 0.75


def test_state_of_the_filters_round_trips() -> None:
    labeler, other = ByFirstAxis(), ByFirstAxis()
    labeler.filters = (Outlier(0), Outlier(2))
    other.filters = (Outlier(1), Outlier(1))
    other.load_state_dict(labeler.state_dict())
    assert [f.state_dict()["image"] for f in other.filters] == [0, 2]
    other.load_state_dict({})  # a checkpoint from before the filters
    assert [f.state_dict()["image"] for f in other.filters] == [0, 2]


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="selcon_plugin"):
        ByFirstAxis()(FEATURES)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "ByFirstAxis: 1 clusters of 3 to 3 images, 1 outliers among 4 images, "
    )


@pytest.mark.parametrize("num_images", [0, 1])
def test_very_few_images_do_not_crash(num_images: int) -> None:
    found = ByFirstAxis()(torch.ones(num_images, 4), torch.zeros(num_images))
    assert found.num_images == num_images
    assert found.measured["num_clusters"] == found.num_clusters


@pytest.mark.parametrize(
    ("features", "camids", "message"),
    [
        (torch.zeros(3), None, r"features must be \(M, C\), got shape \(3,\)"),
        (
            np.array([[1.0, 0.0], [1.0, np.nan], [np.inf, 0.0]]),
            None,
            "image 1 are not finite .2 of 3 images",
        ),
        (FEATURES, torch.zeros(3), r"one camera per image, shape \(4,\), got shape \(3,\)"),
    ],
)
def test_wrong_input_is_named(features: Any, camids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByFirstAxis()(features, camids)


def test_a_labeler_without_eps_is_refused_by_name() -> None:
    labeler = ByFirstAxis()
    with pytest.raises(
        ValueError, match=r"ByFirstAxis has no eps .*use the DBSCAN labeler"
    ):
        labeler.labels_at(labeler(FEATURES), 0.02)


def test_all_labelers_are_found_by_name_and_their_defaults_are_legal() -> None:
    expected = {"Agglomerative", "DBSCAN", "Ensemble", "HDBSCAN", "Infomap", "KMeans"}
    assert expected <= set(labeler_names())
    for name in expected:
        options = labeler_options(name)
        defaults = {key: option.default for key, option in options.items()}
        if name == "Infomap" and importlib.util.find_spec("infomap") is None:
            continue  # an optional package without a release for Python 3.10
        assert isinstance(build_labeler(name, **defaults), Labeler)


def test_build_checks_options_and_sets_filters() -> None:
    label_filter = Outlier(0)
    labeler = build_labeler("DBSCAN", filters=[label_filter], eps=1, min_samples=2)
    assert labeler.filters == (label_filter,)
    assert (labeler.eps, labeler.min_samples) == (1.0, 2)  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match="min_samples must be a whole number >= 1 or 'auto', got 0"
    ):
        build_labeler("DBSCAN", min_samples=0)
    with pytest.raises(ValueError, match="DBSCAN has no option epsilon; it has eps"):
        build_labeler("DBSCAN", epsilon=0.5)
    with pytest.raises(ValueError, match=r"unknown labeler 'Dbscan'; .*DBSCAN"):
        build_labeler("Dbscan")


def test_a_name_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match="'DBSCAN' is already registered"):
        register_labeler("DBSCAN")(ByFirstAxis)


@pytest.mark.parametrize("name", labeler_names())
def test_no_option_counts_more_images_than_there_are(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    defaults, options = build_labeler(name), labeler_options(name)
    defaults.check_counts(2)
    assert not caplog.messages
    for option in ("min_samples", "min_cluster_size"):
        if option in options:
            build_labeler(name, **{option: 40}).check_counts(40)
            with pytest.raises(ValueError, match=f"{option.upper()} is 41.*40 images.*use"):
                build_labeler(name, **{option: 41}).check_counts(40, str.upper)
    assert not caplog.messages
    for option in {"k1", "k2", "k"} & options.keys():
        build_labeler(name, **{option: 41}).check_counts(40, str.upper)
        assert f"{option.upper()} is 41, but there are 40 images" in caplog.messages[-1]
        assert "use" in caplog.messages[-1]

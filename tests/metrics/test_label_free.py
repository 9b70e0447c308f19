import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score

from selcon_plugin.clustering import build_labeler
from selcon_plugin.clustering.camera_centering import center_cameras
from selcon_plugin.clustering.multi_scale import without_mean
from selcon_plugin.metrics.label_free import label_free_quality
from selcon_plugin.workflows.folder_clusters import default_options


def people(noise: float, *, num_people: int = 12, per_person: int = 8) -> torch.Tensor:
    """Sample features of persons: one direction each, with noise."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(num_people, 32, generator=rng)
    drawn = torch.randn(num_people * per_person, 32, generator=rng)
    return centers.repeat_interleave(per_person, dim=0) + noise * drawn


def test_well_separated_persons_score_high_and_are_found() -> None:
    found = label_free_quality(people(0.1))
    assert (found.num_clusters, found.outlier_ratio, found.collapse) == (12, 0.0, "")
    assert found.value > 0.9


def test_the_criterion_decreases_with_the_noise() -> None:
    values = [label_free_quality(people(noise)).value for noise in (0.2, 0.6, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 1.3 * values[2] > 0


def test_it_is_the_silhouette_of_the_clusters_of_the_command() -> None:
    features = people(0.8)
    found = label_free_quality(features)
    clusters = build_labeler("Agglomerative", **default_options("Agglomerative"))(features)
    assert found.threshold == clusters.measured["threshold"]
    assert found.images_per_person == clusters.measured["images_per_person"]
    assert found.num_clusters == clusters.num_clusters
    assert found.outlier_ratio == clusters.outlier_ratio
    labels = clusters.labels.numpy().copy()
    out = np.flatnonzero(labels < 0)
    labels[out] = 100 + np.arange(len(out))
    unit = torch.nn.functional.normalize(features, dim=1)
    expected = silhouette_score(without_mean(unit).numpy(), labels, metric="cosine")
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert clusters.measured["cosine_silhouette"] == pytest.approx(expected, abs=1e-5)


def test_hint_determines_the_threshold() -> None:
    found = label_free_quality(people(0.8), images_per_person=8)
    assert found.threshold == pytest.approx(1 - 1 / 8)
    assert found.images_per_person == pytest.approx(8)


def test_features_are_centered_per_camera() -> None:
    features = people(0.5, num_people=40, per_person=6)
    cameras = torch.arange(240) % 2
    shifted = features + 3 * cameras[:, None] * torch.ones(32)
    unit = torch.nn.functional.normalize(shifted, dim=1)
    hint = {"images_per_person": 6.0}
    centered = label_free_quality(center_cameras(unit, cameras), **hint)
    assert label_free_quality(shifted, cameras, **hint) == centered
    without = label_free_quality(shifted, **hint)
    assert without != centered
    assert label_free_quality(shifted, torch.full((240,), -1), **hint) == without


def test_neither_scale_nor_rotation_matters() -> None:
    features = people(0.7)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.manual_seed(1)))
    plain = label_free_quality(features)
    assert label_free_quality(7 * features).value == pytest.approx(plain.value)
    turned = label_free_quality(features @ rotation)
    assert turned.value == pytest.approx(plain.value, abs=1e-3)


def test_collapsed_features_score_zero_however_tight_their_clusters() -> None:
    few_directions = people(1e-3, num_people=3, per_person=32)
    found = label_free_quality(few_directions)
    assert found.value == 0.0
    assert "few directions" in found.collapse


def test_no_clusters_is_zero() -> None:
    found = label_free_quality(torch.eye(40))
    assert found.value == 0.0
    assert label_free_quality(torch.zeros(0, 4)).value == 0.0

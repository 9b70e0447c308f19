from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units
from selcon_plugin.losses import (
    ClusterContrastiveLoss,
    cluster_contrastive_loss,
    selective_contrastive_loss,
)

CLUSTERS, B, C = 9, 6, 16


@pytest.fixture
def case() -> dict[str, Tensor]:
    bank = units(CLUSTERS, C, seed=2)
    targets = torch.tensor([4, 4, 0, 8, 0, 4])
    noise = torch.randn(B, C, generator=torch.Generator().manual_seed(1))
    # The features resemble their clusters, so that p is neither 0 nor 1; norms vary.
    return {"features": bank[targets] + noise, "bank": bank, "targets": targets}


def loss_by_loops(
    case: dict[str, Tensor],
    temperature: float,
    weights: list[float] | None = None,
    gamma: float = 0.0,
) -> float:
    losses = []
    for i, target in enumerate(case["targets"].tolist()):
        if target == -1:
            continue
        feature = case["features"][i].double()
        feature = feature / feature.norm()
        exps = [
            math.exp(float(feature @ row.double()) / temperature) for row in case["bank"]
        ]
        p = exps[target] / sum(exps)
        weight = 1.0 if weights is None else weights[i]
        losses.append(-weight * (1 - p) ** gamma * math.log(p))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("weights", [None, [0.0, 1.5, 0.3, 1.0, 2.0, 0.7]])
@pytest.mark.parametrize("outliers", [[], [1, 5]])
def test_equals_definition_by_loops(
    case: dict[str, Tensor],
    temperature: float,
    gamma: float,
    weights: list[float] | None,
    outliers: list[int],
    device: str,
) -> None:
    case["targets"][outliers] = -1
    expected = loss_by_loops(case, temperature, weights, gamma)
    on_device = {name: tensor.to(device) for name, tensor in case.items()}
    found = cluster_contrastive_loss(
        **on_device,
        temperature=temperature,
        sample_weight=None if weights is None else torch.tensor(weights, device=device),
        focal_gamma=gamma,
    )
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_temperature_divides_by_default_with_0_05(case: dict[str, Tensor]) -> None:
    found = cluster_contrastive_loss(**case)
    assert found.item() == pytest.approx(loss_by_loops(case, 0.05), rel=1e-5)


def test_norm_of_the_features_is_irrelevant(case: dict[str, Tensor]) -> None:
    expected = cluster_contrastive_loss(**case)
    case["features"] = case["features"] * torch.linspace(0.1, 9, B)[:, None]
    torch.testing.assert_close(cluster_contrastive_loss(**case), expected)


def test_equals_the_selective_loss_with_one_positive_and_all_other_negatives(
    case: dict[str, Tensor],
) -> None:
    others = [[k for k in range(CLUSTERS) if k != t] for t in case["targets"].tolist()]
    expected = selective_contrastive_loss(
        F.normalize(case["features"], dim=1),
        case["bank"],
        case["targets"][:, None],
        torch.tensor(others),
        positive_weight=torch.ones(1),
        temperature=0.05,
    )
    torch.testing.assert_close(cluster_contrastive_loss(**case), expected)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 4.0])
def test_gradient_passes_gradcheck_in_float64(
    case: dict[str, Tensor], gamma: float
) -> None:
    case["targets"][2] = -1

    def loss_of(features: Tensor) -> Tensor:
        return cluster_contrastive_loss(
            **(case | {"features": features}),
            temperature=0.3,
            sample_weight=torch.linspace(0.5, 1.5, B),
            focal_gamma=gamma,
        )

    features = case["features"].double().requires_grad_()
    assert loss_of(features).dtype == torch.float64
    assert torch.autograd.gradcheck(loss_of, (features,))


def test_bank_and_outliers_get_no_gradient(case: dict[str, Tensor]) -> None:
    case["targets"][3] = -1
    case["bank"].requires_grad_()
    features = case["features"].requires_grad_()
    cluster_contrastive_loss(**case, focal_gamma=2.0).backward()
    assert case["bank"].grad is None
    assert features.grad is not None
    assert features.grad.any(dim=1).tolist() == [True, True, True, False, True, True]


def test_outliers_do_not_change_the_loss_of_the_others(case: dict[str, Tensor]) -> None:
    expected = cluster_contrastive_loss(**case)
    case["features"] = torch.cat([units(2, C, seed=5), case["features"]])
    case["targets"] = torch.cat([torch.tensor([-1, -1]), case["targets"]])
    torch.testing.assert_close(cluster_contrastive_loss(**case), expected)


@pytest.mark.parametrize("gamma", [0.0, 4.0])
def test_batch_of_outliers_has_loss_0_with_a_gradient(
    case: dict[str, Tensor], gamma: float
) -> None:
    case["targets"] = torch.full((B,), -1)
    features = case["features"].requires_grad_()
    loss = cluster_contrastive_loss(**case, focal_gamma=gamma)
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


def test_weights_are_not_normalized(case: dict[str, Tensor]) -> None:
    expected = 2 * cluster_contrastive_loss(**case)
    found = cluster_contrastive_loss(**case, sample_weight=torch.full((B,), 2.0))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 4.0])
def test_focal_factor_of_a_perfect_match_is_0_with_a_finite_gradient(gamma: float) -> None:
    bank = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    features = torch.tensor([[1.0, 0.0]], requires_grad=True)
    target = torch.tensor([0])
    loss = cluster_contrastive_loss(
        features, bank, target, temperature=0.01, focal_gamma=gamma
    )
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


def test_focal_factor_computed_by_hand() -> None:
    # The similarities are equal, so p = 1/2 and each loss is 0.5^gamma log 2.
    loss = cluster_contrastive_loss(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.0, 1.0], [0.0, -1.0]]),
        torch.tensor([1]),
        focal_gamma=4.0,
    )
    assert loss.item() == pytest.approx(math.log(2) / 16)


def test_detached_focal_factor_is_a_weight(case: dict[str, Tensor]) -> None:
    features = case["features"].double().requires_grad_()
    case = case | {"features": features, "temperature": 0.3}  # type: ignore[dict-item]
    inside = case["targets"] >= 0
    factors = torch.ones(B, dtype=torch.float64)
    for i in inside.nonzero().flatten().tolist():
        one = {**case, "features": features[i : i + 1], "targets": case["targets"][i, None]}
        factors[i] = (1 - torch.exp(-cluster_contrastive_loss(**one))).item() ** 2
    weighted = cluster_contrastive_loss(**case, sample_weight=factors)
    focal = cluster_contrastive_loss(**case, focal_gamma=2.0, detach_focal=True)
    torch.testing.assert_close(focal, weighted)
    torch.testing.assert_close(focal, cluster_contrastive_loss(**case, focal_gamma=2.0))
    wanted, found, attached = (
        torch.autograd.grad(loss, features, retain_graph=True)[0]
        for loss in (
            weighted,
            focal,
            cluster_contrastive_loss(**case, focal_gamma=2.0),
        )
    )
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, attached, rtol=1e-2)


def test_relabeling_the_clusters_changes_nothing(case: dict[str, Tensor]) -> None:
    expected = cluster_contrastive_loss(**case)
    order = torch.randperm(CLUSTERS, generator=torch.Generator().manual_seed(0))
    case["bank"] = case["bank"][order]
    case["targets"] = torch.argsort(order)[case["targets"]]
    torch.testing.assert_close(cluster_contrastive_loss(**case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 4.0])
def test_autocast_keeps_logits_in_full_precision(
    case: dict[str, Tensor], dtype: torch.dtype, gamma: float
) -> None:
    case["features"] = case["features"].to(dtype)
    options = {"sample_weight": torch.linspace(0.5, 1.5, B), "focal_gamma": gamma}
    expected = cluster_contrastive_loss(
        **(case | {"features": case["features"].float()}),
        **options,  # type: ignore[arg-type]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cluster_contrastive_loss(**case, **options)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("gamma", [0.0, 4.0])
def test_module_equals_function(case: dict[str, Tensor], gamma: float) -> None:
    weight = torch.linspace(0.5, 1.5, B)
    criterion = ClusterContrastiveLoss(0.1, gamma, detach_focal=True)
    settings = {"temperature": 0.1, "focal_gamma": gamma, "detach_focal": True}
    plain = cluster_contrastive_loss(**case, **settings)  # type: ignore[arg-type]
    weighted = cluster_contrastive_loss(**case, sample_weight=weight, **settings)  # type: ignore[arg-type]
    assert torch.equal(criterion(**case), plain)
    assert torch.equal(criterion(**case, sample_weight=weight), weighted)
    assert ClusterContrastiveLoss().temperature == 0.05
    assert not criterion.state_dict()


def test_wrong_arguments_are_reported(case: dict[str, Tensor]) -> None:
    for temperature in (0, math.nan):
        message = f"temperature .*got {temperature}"
        with pytest.raises(ValueError, match=message):
            cluster_contrastive_loss(**case, temperature=temperature)
        with pytest.raises(ValueError, match=message):
            ClusterContrastiveLoss(temperature)
    for gamma in (-1.0, math.nan):
        message = rf"focal_gamma must be 0 \(off\) or more, got {gamma}"
        with pytest.raises(ValueError, match=message):
            cluster_contrastive_loss(**case, focal_gamma=gamma)
        with pytest.raises(ValueError, match=message):
            ClusterContrastiveLoss(focal_gamma=gamma)
    with pytest.raises(ValueError, match=r"each of the 6 images, got shape \(6, 1\)"):
        cluster_contrastive_loss(**case, sample_weight=torch.ones(B, 1))
    case["bank"] = torch.empty(0, C)
    with pytest.raises(ValueError, match="bank has no rows"):
        cluster_contrastive_loss(**case)

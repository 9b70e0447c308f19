from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units
from selcon_plugin.losses import (
    SelectiveContrastiveLoss,
    positive_weights,
    selective_contrastive_loss,
)
from selcon_plugin.losses import selective_contrastive as module

M, B, P, N, C = 30, 5, 4, 9, 16


@pytest.fixture
def case() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(M, generator=generator)[: P + N] for _ in range(B)])
    return {
        "features": units(B, C, seed=1),
        "bank": units(M, C, seed=2),
        "positive_index": rows[:, :P],
        "negative_index": rows[:, P:],
        "positive_weight": torch.tensor([0.5, 0.3, 0.2, 0.4]),
    }


@pytest.fixture(params=["small", "gather", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute the logits in float64, from gathered rows or from the whole product."""
    force(request.param, monkeypatch)
    return str(request.param)


def force(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_DOUBLE_VALUES", 2**20 if path == "small" else 0)
    rows = 0.0 if path == "gather" else 1e9
    monkeypatch.setattr(module, "_rows_per_candidate", lambda batch_size: rows)


def loss_by_loops(case: dict[str, Tensor], temperature: float) -> float:
    total = 0.0
    for i in range(B):
        candidates = [
            *case["positive_index"][i].tolist(),
            *case["negative_index"][i].tolist(),
        ]
        logits = [
            float(case["features"][i].double() @ case["bank"][a].double()) / temperature
            for a in candidates
        ]
        denominator = sum(math.exp(logit) for logit in logits)
        for p, weight in enumerate(case["positive_weight"].tolist()):
            total -= weight * math.log(math.exp(logits[p]) / denominator)
    return total / B


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equals_definition_by_loops(
    case: dict[str, Tensor], path: str, temperature: float, device: str
) -> None:
    on_device = {name: tensor.to(device) for name, tensor in case.items()}
    found = selective_contrastive_loss(**on_device, temperature=temperature)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss_by_loops(case, temperature), rel=2e-6)


def test_temperature_divides_by_default_with_0_1(case: dict[str, Tensor]) -> None:
    found = selective_contrastive_loss(**case)
    assert found.item() == pytest.approx(loss_by_loops(case, 0.1), rel=2e-6)


def test_single_positive_of_weight_1_is_infonce(case: dict[str, Tensor], path: str) -> None:
    case |= {
        "positive_index": case["positive_index"][:, :1],
        "positive_weight": torch.ones(1),
    }
    candidates = torch.cat([case["positive_index"], case["negative_index"]], dim=1)
    logits = (case["features"][:, None] * case["bank"][candidates]).sum(dim=2) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))
    found = selective_contrastive_loss(**case, temperature=0.07)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


def test_gradient_passes_gradcheck_in_float64(case: dict[str, Tensor]) -> None:
    case["bank"] = case["bank"].double()

    def loss_of(features: Tensor) -> Tensor:
        return selective_contrastive_loss(**(case | {"features": features}))

    features = case["features"].double().requires_grad_()
    assert torch.autograd.gradcheck(loss_of, (features,))


def test_both_ways_to_compute_the_logits_agree(
    case: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    products = []
    bank_product = module.bank_product
    monkeypatch.setattr(
        module, "bank_product", lambda *args: products.append(1) or bank_product(*args)
    )
    results = {}
    for path in ("small", "gather", "dense"):
        force(path, monkeypatch)
        products.clear()
        features = case["features"].clone().requires_grad_()
        loss = selective_contrastive_loss(**(case | {"features": features}))
        loss.backward()
        assert features.grad is not None
        results[path] = (loss, features.grad)
        assert len(products) == (path == "dense")
    for path in ("gather", "dense"):
        torch.testing.assert_close(results[path][0], results["small"][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(results[path][1], results["small"][1], rtol=0, atol=2e-6)


def test_small_banks_and_huge_gathers_use_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = []
    bank_product = module.bank_product
    monkeypatch.setattr(
        module, "bank_product", lambda *args: products.append(1) or bank_product(*args)
    )
    monkeypatch.setattr(module, "_MAX_DOUBLE_VALUES", 0)

    def takes_product(num_images: int, num_candidates: int) -> bool:
        products.clear()
        candidates = torch.zeros(2, num_candidates, dtype=torch.int64)
        module.candidate_similarity(
            torch.ones(2, 1, 3), torch.ones(num_images, 3), candidates
        )
        return bool(products)

    crossover = int(10 * module._rows_per_candidate(2))
    assert takes_product(crossover - 1, 10)
    assert not takes_product(crossover, 10)
    monkeypatch.setattr(module, "_MAX_GATHERED_VALUES", 59)
    assert takes_product(crossover, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_logits_in_full_precision(
    case: dict[str, Tensor], path: str, dtype: torch.dtype
) -> None:
    case["bank"] = case["bank"].to(dtype)
    expected = selective_contrastive_loss(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = selective_contrastive_loss(**case)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_half_precision_bank_is_close_to_float32(
    case: dict[str, Tensor], path: str, dtype: torch.dtype, tolerance: float
) -> None:
    expected = selective_contrastive_loss(**case)
    case["bank"] = case["bank"].to(dtype)
    found = selective_contrastive_loss(**case)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)


def test_views_equal_separate_calls(case: dict[str, Tensor], path: str) -> None:
    views = torch.stack([case["features"], units(B, C, seed=3) * 8**0.5], dim=1)
    together = views.clone().requires_grad_()
    losses = selective_contrastive_loss(**(case | {"features": together}))
    (losses[0] + 2 * losses[1]).backward()
    apart = views.clone().requires_grad_()
    one, two = (
        selective_contrastive_loss(**(case | {"features": view}))
        for view in apart.unbind(1)
    )
    (one + 2 * two).backward()
    torch.testing.assert_close(losses, torch.stack([one, two]), rtol=1e-6, atol=0)
    torch.testing.assert_close(together.grad, apart.grad, rtol=0, atol=2e-6)


def test_order_of_negatives_is_irrelevant(case: dict[str, Tensor], path: str) -> None:
    expected = selective_contrastive_loss(**case)
    case["negative_index"] = case["negative_index"].flip(1)
    torch.testing.assert_close(
        selective_contrastive_loss(**case), expected, rtol=1e-6, atol=0
    )


def test_inputs_are_unchanged_and_the_bank_gets_no_gradient(
    case: dict[str, Tensor], path: str
) -> None:
    before = {name: tensor.clone() for name, tensor in case.items()}
    case["features"].requires_grad_()
    case["bank"].requires_grad_()
    selective_contrastive_loss(**case).backward()
    assert case["features"].grad is not None
    assert case["bank"].grad is None
    for name, tensor in case.items():
        assert torch.equal(tensor, before[name]), name


def test_equal_candidates_give_the_log_of_their_number() -> None:
    # All logits are equal (duplicates or empty banks), so each probability is 1 / (P + N).
    for bank in (torch.zeros(6, 4), units(1, 4, seed=0).repeat(6, 1)):
        loss = selective_contrastive_loss(
            units(2, 4, seed=1),
            bank,
            torch.tensor([[0, 1], [2, 3]]),
            torch.tensor([[2, 3, 4], [0, 1, 5]]),
            positive_weight=torch.tensor([0.5, 0.875]),
        )
        assert loss.item() == pytest.approx(1.375 * math.log(5), rel=1e-6)


def test_no_negatives_and_no_neighbors_give_zero_loss() -> None:
    loss = selective_contrastive_loss(
        units(1, 4, seed=0),
        units(1, 4, seed=1),
        torch.tensor([[0]]),
        torch.empty(1, 0, dtype=torch.int64),
        positive_weight=torch.ones(1),
    )
    assert loss.item() == 0.0


def masked_case(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return anchors with 4, 2, 1, 3 and 0 positives and 9, 6, 3, 0 and 8 negatives."""
    counts = torch.tensor([[4], [2], [1], [3], [0]])
    weight = torch.rand(B, P, generator=torch.Generator().manual_seed(4)) + 0.1
    negative_counts = torch.tensor([[9], [6], [3], [0], [8]])
    return case | {
        "positive_weight": weight * (torch.arange(P) < counts),
        "negative_mask": torch.arange(N).flip(0) < negative_counts,
    }


def masked_loss_by_loops(
    case: dict[str, Tensor], temperature: float, gamma: float = 0.0
) -> float:
    total = 0.0
    for i in range(B):
        feature = case["features"][i].double()

        def exponential(row: Tensor, feature: Tensor = feature) -> float:
            return math.exp(float(feature @ case["bank"][row].double()) / temperature)

        weights = case["positive_weight"][i].tolist()
        positives = [exponential(row) for row in case["positive_index"][i]]
        negatives = [
            exponential(row)
            for row, kept in zip(
                case["negative_index"][i], case["negative_mask"][i], strict=True
            )
            if kept
        ]
        present = [value for value, w in zip(positives, weights, strict=True) if w]
        denominator = sum(present) + sum(negatives)
        factor = (sum(negatives) / denominator) ** gamma if gamma and present else 1.0
        for value, weight in zip(positives, weights, strict=True):
            if weight:
                total -= factor * weight * math.log(value / denominator)
    return total / B


def test_weights_per_anchor_and_masked_candidates_equal_definition_by_loops(
    case: dict[str, Tensor], path: str, device: str
) -> None:
    case = masked_case(case)
    on_device = {name: tensor.to(device) for name, tensor in case.items()}
    for temperature in (0.1, 1.0):
        found = selective_contrastive_loss(**on_device, temperature=temperature)
        expected = masked_loss_by_loops(case, temperature)
        assert found.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_factor_equals_definition_by_loops(
    case: dict[str, Tensor], path: str, gamma: float
) -> None:
    case = masked_case(case)
    found = selective_contrastive_loss(**case, temperature=0.5, focal_gamma=gamma)
    expected = masked_loss_by_loops(case, 0.5, gamma)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert found.item() < masked_loss_by_loops(case, 0.5)


def test_focal_gradient_is_correct_and_finite_at_a_perfect_match(
    case: dict[str, Tensor],
) -> None:
    case["bank"] = case["bank"].double()

    def loss_of(features: Tensor) -> Tensor:
        changed = case | {"features": features}
        return selective_contrastive_loss(**changed, focal_gamma=2.0)

    features = case["features"].double().requires_grad_()
    assert torch.autograd.gradcheck(loss_of, (features,))
    match = torch.eye(4)[:1].requires_grad_()
    loss = selective_contrastive_loss(
        match,
        torch.eye(4),
        torch.tensor([[0]]),
        torch.tensor([[1]]),
        positive_weight=torch.ones(1),
        temperature=1e-3,
        focal_gamma=0.5,
    )
    loss.backward()
    assert match.grad is not None
    assert match.grad.isfinite().all()


def test_negative_focal_exponent_is_refused(case: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"focal_gamma .*0.*got -1"):
        selective_contrastive_loss(**case, focal_gamma=-1.0)


@pytest.mark.parametrize("given", ["positive_weight", "negative_mask"])
def test_only_weights_or_only_a_mask_equal_definition_by_loops(
    case: dict[str, Tensor], path: str, given: str
) -> None:
    masked = masked_case(case)
    full = {
        "positive_weight": case["positive_weight"].expand(B, P),
        "negative_mask": torch.ones(B, N, dtype=torch.bool),
    }
    expected = masked_loss_by_loops(case | full | {given: masked[given]}, 0.1)
    found = selective_contrastive_loss(**(case | {given: masked[given]}))
    assert found.item() == pytest.approx(expected, rel=2e-6)


def test_equal_weights_and_a_full_mask_change_nothing(
    case: dict[str, Tensor], path: str
) -> None:
    expected = selective_contrastive_loss(**case)
    case["positive_weight"] = case["positive_weight"].expand(B, P)
    case["negative_mask"] = torch.ones(B, N, dtype=torch.bool)
    torch.testing.assert_close(
        selective_contrastive_loss(**case), expected, rtol=1e-6, atol=0
    )


def test_views_share_weights_and_mask(case: dict[str, Tensor], path: str) -> None:
    case = masked_case(case)
    views = torch.stack([case["features"], units(B, C, seed=3) * 8**0.5], dim=1)
    losses = selective_contrastive_loss(**(case | {"features": views}))
    apart = [
        selective_contrastive_loss(**(case | {"features": view}))
        for view in views.unbind(1)
    ]
    torch.testing.assert_close(losses, torch.stack(apart), rtol=1e-6, atol=0)


def test_row_of_a_masked_candidate_is_irrelevant(
    case: dict[str, Tensor], path: str
) -> None:
    case = masked_case(case)
    expected = selective_contrastive_loss(**case)
    case["positive_index"] = torch.where(
        case["positive_weight"] > 0, case["positive_index"], 0
    )
    case["negative_index"] = torch.where(case["negative_mask"], case["negative_index"], 0)
    found = selective_contrastive_loss(**case)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_gradient_with_masked_candidates(case: dict[str, Tensor]) -> None:
    case = masked_case(case) | {"bank": case["bank"].double()}
    case["negative_mask"][4] = False  # the last anchor has no candidate at all

    def loss_of(features: Tensor) -> Tensor:
        return selective_contrastive_loss(**(case | {"features": features}))

    features = case["features"].double().requires_grad_()
    assert torch.autograd.gradcheck(loss_of, (features,))
    (gradient,) = torch.autograd.grad(loss_of(features), features)
    assert gradient.any(dim=1).tolist() == [True, True, True, True, False]


def ignored_case(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masked case with some ignored pairs of positives and negatives."""
    generator = torch.Generator().manual_seed(6)
    return masked_case(case) | {
        "ignored_positive": torch.rand(B, P, generator=generator) < 0.5,
        "ignored_negative": torch.rand(B, N, generator=generator) < 0.5,
    }


def ignored_loss_by_loops(case: dict[str, Tensor], temperature: float) -> float:
    """Compute the loss of each positive against the negatives that are not ignored."""
    total = 0.0
    for p in range(P):
        fewer = case["ignored_positive"][:, p, None] & case["ignored_negative"]
        counted = case["negative_mask"] & ~fewer
        for i in range(B):
            feature = case["features"][i].double()
            present = case["positive_weight"][i] != 0
            if not present[p]:
                continue
            rows = torch.cat(
                [
                    case["positive_index"][i][present],
                    case["negative_index"][i][counted[i]],
                ]
            )
            values = [
                math.exp(float(feature @ case["bank"][row].double()) / temperature)
                for row in rows
            ]
            own = case["bank"][case["positive_index"][i, p]].double()
            value = math.exp(float(feature @ own) / temperature)
            total -= float(case["positive_weight"][i, p]) * math.log(value / sum(values))
    return total / B


def test_ignored_pairs_equal_definition_by_loops(
    case: dict[str, Tensor], path: str, device: str
) -> None:
    case = ignored_case(case)
    on_device = {name: tensor.to(device) for name, tensor in case.items()}
    for temperature in (0.1, 1.0):
        found = selective_contrastive_loss(**on_device, temperature=temperature)
        expected = ignored_loss_by_loops(case, temperature)
        assert found.item() == pytest.approx(expected, rel=2e-6)
        assert expected < masked_loss_by_loops(case, temperature)


def test_no_pair_and_all_pairs_ignored(case: dict[str, Tensor], path: str) -> None:
    case = masked_case(case)
    plain = selective_contrastive_loss(**case)
    nothing, everything = torch.zeros(B, P).bool(), torch.ones(B, N).bool()
    for positives, negatives in ((nothing, everything), (~nothing, ~everything)):
        found = selective_contrastive_loss(
            **case, ignored_positive=positives, ignored_negative=negatives
        )
        torch.testing.assert_close(found, plain)
    found = selective_contrastive_loss(
        **case, ignored_positive=~nothing, ignored_negative=everything
    )
    case["negative_mask"] = ~everything
    torch.testing.assert_close(found, selective_contrastive_loss(**case))


def test_gradient_with_ignored_pairs(case: dict[str, Tensor]) -> None:
    case = ignored_case(case) | {"bank": case["bank"].double()}

    def loss_of(features: Tensor) -> Tensor:
        return selective_contrastive_loss(**(case | {"features": features}))

    assert torch.autograd.gradcheck(loss_of, (case["features"].double().requires_grad_(),))


def test_paper_weights() -> None:
    assert positive_weights(8).tolist() == [0.5] + 7 * [0.125]
    assert positive_weights(8).sum().item() == pytest.approx(1.375)
    assert positive_weights(1, self_weight=0.3).tolist() == pytest.approx([0.3])
    weights = positive_weights(3, self_weight=0.6, neighbor_scale=1.0)
    assert weights.tolist() == pytest.approx([0.6, 0.2, 0.2])


@pytest.mark.parametrize("num_positives", [P, 1, 2])
def test_module_equals_function_and_follows_the_positives_given(
    case: dict[str, Tensor], num_positives: int
) -> None:
    del case["positive_weight"]
    case["positive_index"] = case["positive_index"][:, :num_positives]
    criterion = SelectiveContrastiveLoss(P - 1, 0.6, 1.5, 0.2)
    weights = positive_weights(num_positives, self_weight=0.6, neighbor_scale=1.5)
    expected = selective_contrastive_loss(**case, positive_weight=weights, temperature=0.2)
    assert torch.equal(criterion(**case), expected)
    assert not criterion.state_dict()
    assert not list(criterion.parameters())


def test_wrong_arguments_are_reported(case: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"temperature .*got 0"):
        selective_contrastive_loss(**case, temperature=0)
    with pytest.raises(ValueError, match=r"temperature .*got nan"):
        selective_contrastive_loss(**case, temperature=math.nan)
    case["positive_weight"] = torch.ones(P + 1)
    with pytest.raises(ValueError, match=r"positive_weight .*\(4,\).*\(5, 4\).*\(5,\)"):
        selective_contrastive_loss(**case)
    case["positive_weight"] = torch.ones(P)
    with pytest.raises(ValueError, match=r"negative_mask .*\(5, 9\), got .*bool .*\(9,\)"):
        selective_contrastive_loss(**case, negative_mask=torch.ones(N, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"negative_mask must be bool .*torch\.float32"):
        selective_contrastive_loss(**case, negative_mask=torch.ones(B, N))
    with pytest.raises(ValueError, match=r"num_neighbors .*0.*got -1"):
        SelectiveContrastiveLoss(-1)
    with pytest.raises(ValueError, match=r"temperature .*got -0\.1"):
        SelectiveContrastiveLoss(7, temperature=-0.1)
    with pytest.raises(ValueError, match="ignored_negative must be given together"):
        selective_contrastive_loss(**case, ignored_positive=torch.ones(B, P).bool())

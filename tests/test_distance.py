from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from helpers.features import units
from selcon_plugin import distance as distance_module
from selcon_plugin.distance import bank_product, fused_distance


@pytest.fixture
def case() -> dict[str, Tensor]:
    return {
        "global_features": units(5, 12, seed=0),
        "part_features": units(5, 3, 4, seed=1),
        "camids": torch.tensor([0, 1, 2, -1, 0]),
        "global_bank": units(9, 12, seed=2),
        "part_bank": units(9, 3, 4, seed=3),
        "bank_camids": torch.tensor([0, 0, 1, 1, 2, -1, -1, 3, 2]),
    }


def distance_by_loops(case: dict[str, Tensor], weight: float, penalty: float) -> Tensor:
    g, parts, cameras = case["global_features"], case["part_features"], case["camids"]
    expected = torch.zeros(len(g), len(case["global_bank"]), dtype=torch.float64)
    for i, j in itertools.product(*map(range, expected.shape)):
        squared_global = ((g[i] - case["global_bank"][j]).double() ** 2).sum()
        squared_parts = [
            ((parts[i, s] - case["part_bank"][j, s]).double() ** 2).sum()
            for s in range(parts.shape[1])
        ]
        expected[i, j] = weight * squared_global
        expected[i, j] += (1 - weight) * sum(squared_parts) / len(squared_parts)
        known = cameras[i] >= 0 and case["bank_camids"][j] >= 0
        if known and cameras[i] == case["bank_camids"][j]:
            expected[i, j] += penalty
    return expected.float()


@pytest.mark.parametrize(
    ("weight", "penalty"), [(0.5, 0.05), (0.2, 0.7), (1.0, 0.0), (0.0, 1)]
)
def test_equals_definition_by_loops(
    case: dict[str, Tensor], weight: float, penalty: float, device: str
) -> None:
    on_device = {name: tensor.to(device) for name, tensor in case.items()}
    found = fused_distance(
        **on_device, global_distance_weight=weight, same_camera_penalty=penalty
    )
    assert found.dtype == torch.float32
    expected = distance_by_loops(case, weight, penalty)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-6)


def test_paper_weights_are_the_defaults(case: dict[str, Tensor]) -> None:
    expected = distance_by_loops(case, 0.5, 0.05)
    torch.testing.assert_close(fused_distance(**case), expected, rtol=0, atol=2e-6)


def test_without_parts_only_the_global_distance_is_used(case: dict[str, Tensor]) -> None:
    case |= {"part_features": None, "part_bank": None}  # type: ignore[dict-item]
    whole = torch.cdist(case["global_features"], case["global_bank"]) ** 2
    same = (case["camids"][:, None] == case["bank_camids"]) & (case["camids"] >= 0)[:, None]
    torch.testing.assert_close(
        fused_distance(**case, global_distance_weight=0.1),
        whole + 0.05 * same,
        rtol=0,
        atol=2e-6,
    )


def test_unknown_cameras_match_nothing(case: dict[str, Tensor]) -> None:
    without = fused_distance(**(case | {"camids": None, "bank_camids": None}))  # type: ignore[dict-item]
    unknown = torch.full_like(case["camids"], -1)
    assert torch.equal(fused_distance(**(case | {"camids": unknown})), without)
    unknown = torch.full_like(case["bank_camids"], -1)
    assert torch.equal(fused_distance(**(case | {"bank_camids": unknown})), without)


@pytest.mark.parametrize(
    "pair", [("part_features", "part_bank"), ("camids", "bank_camids")]
)
def test_half_a_pair_is_an_error(case: dict[str, Tensor], pair: tuple[str, str]) -> None:
    for name in pair:
        with pytest.raises(
            ValueError, match=f"{pair[0]} and {pair[1]} must be given together"
        ):
            fused_distance(**(case | {name: None}))  # type: ignore[dict-item]


def test_inputs_unchanged_and_no_gradient(case: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in case.items()}
    case["global_features"].requires_grad_()
    assert not fused_distance(**case).requires_grad
    for name, tensor in case.items():
        assert torch.equal(tensor, before[name]), name


def test_autocast_keeps_full_precision(case: dict[str, Tensor]) -> None:
    expected = fused_distance(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused_distance(**case), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_half_precision_bank_is_close_to_float32(
    dtype: torch.dtype, tolerance: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        distance_module, "_CPU_CHUNK_ROWS", 4
    )  # several and a partial chunk
    features, bank = units(5, 64, seed=0).to(device), units(11, 64, seed=1).to(device)
    found = bank_product(features, bank.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, features @ bank.T, rtol=0, atol=tolerance)
    if device == "cpu":  # only the bank is rounded
        widened = features @ bank.to(dtype).float().T
        torch.testing.assert_close(found, widened, rtol=0, atol=1e-6)

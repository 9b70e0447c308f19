from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import online_association_loss
from selcon_plugin.methods import build_method
from selcon_plugin.methods.cap import CAP
from selcon_plugin.methods.o2cap import O2CAP

M, C = 30, 16
LABELS = torch.tensor([i // 5 if i < 25 else -1 for i in range(M)])
CAMIDS = torch.arange(M) % 4
BATCH = torch.tensor([0, 1, 7, 12, 26, 18])
units = units_of(C)


def make_method(camids: Tensor = CAMIDS, **options: Any) -> O2CAP:
    method = prepared_method("O2CAP", C, PseudoLabels(LABELS), camids, **options)
    assert isinstance(method, O2CAP)
    return method


def losses_of(method: O2CAP | CAP) -> dict[str, float]:
    found = method.loss(Embeddings(units(len(BATCH), seed=3)), BATCH, None)
    return {name: value.item() for name, value in found.items()}


def test_offline_and_intra_camera_losses_equal_those_of_cap() -> None:
    cap = build_method("CAP", M, C, inter_epoch=0, inter_weight=1.0)
    assert isinstance(cap, CAP)
    cap.prepare(Embeddings(units(M, seed=0)), CAMIDS, PseudoLabels(LABELS))
    wanted = losses_of(cap)
    found = losses_of(make_method(intra_weight=0.5))
    assert found["loss_offline"] == pytest.approx(wanted["loss_inter"])
    assert found["loss_intra"] == pytest.approx(0.5 * wanted["loss_intra"])


def test_intra_camera_loss_is_off_as_in_the_release() -> None:
    assert set(losses_of(make_method())) == {"loss_offline", "loss_online"}


@pytest.mark.parametrize(("image_weight", "num_positives"), [(0.15, 3), (0.0, 1), (1.0, 2)])
def test_online_loss_sums_over_cameras(image_weight: float, num_positives: int) -> None:
    options: dict[str, Any] = {
        "image_weight": image_weight,
        "num_positives": num_positives,
        "num_negatives": 4,
        "temperature": 0.1,
    }
    method = make_method(**options)
    features, proxies = units(len(BATCH), seed=3), method.proxies
    wanted = 0.0
    for camera in range(4):
        seen = (CAMIDS[BATCH] == camera) & (LABELS[BATCH] >= 0)
        if seen.any():
            wanted += online_association_loss(
                features[seen] @ proxies.bank.T,
                proxies.bank,
                proxies.proxies[BATCH[seen]],
                proxies.cameras,
                **options,
            ).item()
    assert losses_of(method)["loss_online"] == pytest.approx(wanted, rel=1e-5)


def test_with_image_weight_0_the_own_proxy_is_its_positive() -> None:
    """With one camera, the only positive of the proxy is the cluster's own row."""
    camids = torch.zeros(M, dtype=torch.int64)
    found = losses_of(make_method(camids, image_weight=0.0, num_positives=1))
    assert found["loss_online"] == pytest.approx(found["loss_offline"], rel=1e-6)

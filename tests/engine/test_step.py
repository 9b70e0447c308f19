"""The one training step of both hosts, against a plain loop."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selcon_plugin.engine.guard import StepGuard
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.engine.step import take_step
from selcon_plugin.features import Embeddings, GlobalPartEmbedding
from selcon_plugin.methods import build_method
from selcon_plugin.models.preprocessing import Preprocessing

IMAGES, BATCH, STEPS = 12, 8, 3
PATHS = [f"{i:02}.jpg" for i in range(IMAGES)]


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def batch_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(IMAGES, generator=generator)[:BATCH]
    return {
        "images": torch.randn(BATCH, 3, 16, 8, generator=generator),
        "index": index,
        "camids": index % 3,
        "img_paths": [PATHS[i] for i in index.tolist()],
    }


class Training:
    """A network with banks, its optimizer and its guard."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam) -> None:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.network = EmbeddingNetwork(
            backbone,
            GlobalPartEmbedding(8, 8, 2),
            Preprocessing(pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3),
            images_normalized=True,
        )
        options = {"num_neighbors": 2, "num_negatives": 4, "warmup_epochs": 0}
        method = build_method("SelectiveContrastive", IMAGES, 8, 2, 4, **options)
        method.prepare(Embeddings(unit(IMAGES, 8), unit(IMAGES, 2, 4)), None)
        self.network.method = method
        self.optimizer = optimizer(self.network.parameters(), lr=0.01, weight_decay=0.1)
        self.guard = StepGuard(self.network, PATHS)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.network.losses(batch["images"], batch["index"], batch["camids"])

    def step(self, number: int, **changes: Any) -> dict[str, float]:
        batch = batch_of(number)
        options = {"images_name": "images", "guard": self.guard, **changes}
        losses = take_step(
            self.losses, batch, self.optimizer, step=number, model=self.network, **options
        )
        if self.guard.skipped:
            self.network.clear_pending()
        else:
            self.network.update_banks()
        return losses

    def plain_step(self, number: int, parts: int) -> dict[str, float]:
        """Written out: what a step is meant to be."""
        batch = batch_of(number)
        self.optimizer.zero_grad()
        size = BATCH // parts
        sums: dict[str, Tensor] = {}
        for start in range(0, BATCH, size):
            part = {name: values[start : start + size] for name, values in batch.items()}
            losses = self.losses(part)
            (sum(losses.values()) / parts).backward()  # type: ignore[union-attr]
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / parts
        self.optimizer.step()
        self.network.update_banks()
        return {name: loss.item() for name, loss in sums.items()}

    def state(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.network.state_dict())


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("guarded", [True, False])
def test_step_is_the_plain_loop_bit_by_bit(
    optimizer: type[torch.optim.Optimizer], parts: int, guarded: bool
) -> None:
    ours, plain = Training(optimizer), Training(optimizer)
    changes = {} if guarded else {"guard": None}
    for number in range(STEPS):
        expected = plain.plain_step(number, parts)
        assert ours.step(number, num_micro_batches=parts, **changes) == expected
    assert_equal(ours.state(), plain.state())


def test_sum_of_the_losses_is_returned_under_its_name() -> None:
    losses = Training().step(0, num_micro_batches=2, total_name="loss")
    assert list(losses) == ["loss_global", "loss_part", "loss"]
    assert losses["loss"] == pytest.approx(losses["loss_global"] + losses["loss_part"])


@pytest.mark.parametrize("parts", [1, 2])
def test_skipped_step_leaves_everything_as_it_was(
    parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, statistics, banks, optimizer; and the next step is that of a clean run."""
    training, unbroken = Training(), Training()
    for run in (training, unbroken):
        run.step(0)
    before, optimizer = training.state(), copy.deepcopy(training.optimizer.state_dict())
    bad = batch_of(1)
    bad["images"][2, 0, 5, 5] = math.nan
    told: list[Any] = []
    with caplog.at_level(logging.WARNING):
        take_step(
            training.losses,
            bad,
            training.optimizer,
            images_name="images",
            step=1,
            model=training.network,
            num_micro_batches=parts,
            guard=training.guard,
            before_update=told.append,
        )
    assert training.guard.skipped
    assert "Skipped step 2" in caplog.text
    assert not told
    assert all(weight.grad is None for weight in training.network.parameters())
    training.network.clear_pending()
    assert_equal(training.state(), before)
    assert str(training.optimizer.state_dict()) == str(optimizer)
    for run in (training, unbroken):
        run.step(2, num_micro_batches=parts)
    assert_equal(training.state(), unbroken.state())


def test_losses_are_told_before_the_weights_move() -> None:
    training = Training()
    before = training.state()
    told: list[dict[str, float]] = []

    def tell(losses: Any) -> None:
        told.append(dict(losses))
        name = "heads.global_projection.weight"
        assert torch.equal(training.network.state_dict()[name], before[name])

    assert training.step(0, before_update=tell) == told[0]
    name = "heads.global_projection.weight"
    assert not torch.equal(training.network.state_dict()[name], before[name])


class Scaler:
    """CUDA's loss scaler on a CPU: a power of two, which leaves no trace."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scale(self, loss: Tensor) -> Tensor:
        self.calls.append("scale")
        return loss * 1024.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad /= 1024.0
        optimizer.step()

    def update(self) -> None:
        self.calls.append("update")


@pytest.mark.parametrize("parts", [1, 2])
def test_scaler_scales_every_loss_and_steps_once(parts: int) -> None:
    scaled, plain, scaler = Training(), Training(), Scaler()
    for number in range(STEPS):
        found = scaled.step(number, num_micro_batches=parts, scaler=scaler)
        assert found == plain.step(number, num_micro_batches=parts)
    assert scaler.calls == (["scale"] * parts + ["step", "update"]) * STEPS
    assert_equal(scaled.state(), plain.state())


def test_guard_leaves_gradients_to_the_scaler() -> None:
    class Overflow(Scaler):
        def scale(self, loss: Tensor) -> Tensor:
            return loss * math.inf

        def step(self, optimizer: torch.optim.Optimizer) -> None:
            """Skip it, as the real one does."""

    training = Training()
    training.step(0, scaler=Overflow())
    assert not training.guard.skipped
    assert training.guard.num_skipped == 0
    assert training.network.method.step == 1  # the banks are written


def test_model_without_losses_is_refused() -> None:
    training, batch = Training(), batch_of(0)
    with pytest.raises(RuntimeError, match="no losses"):
        take_step(
            lambda _: {},
            batch,
            training.optimizer,
            images_name="images",
            step=0,
            model=training.network,
        )

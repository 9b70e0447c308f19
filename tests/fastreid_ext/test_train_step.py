from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastreid.config import CfgNode
from fastreid.engine.train_loop import AMPTrainer, SimpleTrainer
from fastreid.modeling.meta_arch import build_model
from fastreid.utils.events import EventStorage
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from selcon_plugin.engine.batches import split_batch
from selcon_plugin.fastreid_ext.train_step import (
    AccumulatingAMPTrainer,
    AccumulatingTrainer,
)
from selcon_plugin.models.ghost_norm import convert_ghost_batch_norm

BATCH = 8


class TwoLosses(nn.Module):
    """A small network that returns losses by name, as FastReID's models do."""

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm: nn.Module = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten())
        self.classify = nn.Linear(6 * 4 * 4, BATCH)
        self.sizes: list[int] = []

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.sizes.append(len(batch["img_paths"]))
        features = self.features(batch["images"])
        wrong = nn.functional.cross_entropy(self.classify(features), batch["targets"])
        return {"loss_class": wrong, "loss_size": features.square().mean()}


def batches(size: int = BATCH, dtype: torch.dtype = torch.float32) -> Iterator[dict]:
    generator = torch.Generator().manual_seed(1)
    while True:
        images = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
        yield {
            "images": images.to(dtype),
            "targets": torch.arange(size),
            "camids": torch.arange(size) % 2,
            "img_paths": [f"{place}.jpg" for place in range(size)],
        }


class Loader:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __iter__(self) -> Iterator[dict]:
        return batches(**self.settings)


def make_trainer(
    trainer_class: type[SimpleTrainer], model: nn.Module, **settings: Any
) -> SimpleTrainer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    dtype = next(model.parameters()).dtype
    return trainer_class(model, Loader(dtype=dtype), optimizer, None, **settings)


def run(trainer: SimpleTrainer, num_steps: int) -> dict[str, list[float]]:
    """Take some steps; return what was logged, by name."""
    with EventStorage(0) as storage:
        for trainer.iter in range(num_steps):
            storage.iter = trainer.iter
            trainer.run_step()
        logged = {
            name: [value for value, _ in history.values()]
            for name, history in storage.histories().items()
        }
    del logged["data_time"]
    return logged


def assert_same_state(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], **tolerance, msg=name)


# --- full precision ----------------------------------------------------------------------


def test_one_micro_batch_equals_simple_trainer_bit_by_bit() -> None:
    host, ours = TwoLosses(), TwoLosses()
    expected = run(make_trainer(SimpleTrainer, host), 5)
    found = run(make_trainer(AccumulatingTrainer, ours, num_micro_batches=1), 5)
    assert found == expected
    assert found.keys() == {"loss_class", "loss_size", "total_loss"}
    assert_same_state(ours, host, rtol=0, atol=0)


@pytest.mark.parametrize("num_micro_batches", [2, 4, 8])
def test_equals_the_whole_batch_without_batch_norm(num_micro_batches: int) -> None:
    host, ours = (TwoLosses(batch_norm=False).double() for _ in range(2))
    expected = run(make_trainer(SimpleTrainer, host), 5)
    settings = {"num_micro_batches": num_micro_batches}
    found = run(make_trainer(AccumulatingTrainer, ours, **settings), 5)
    assert ours.sizes == [BATCH // num_micro_batches] * num_micro_batches * 5
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-9)
    assert_same_state(ours, host, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("num_micro_batches", [2, 4])
def test_equals_the_whole_batch_with_ghost_batch_norm(num_micro_batches: int) -> None:
    host, ours = (TwoLosses().double() for _ in range(2))
    convert_ghost_batch_norm(host, BATCH // num_micro_batches)
    settings = {"num_micro_batches": num_micro_batches}
    run(make_trainer(SimpleTrainer, host), 5)
    run(make_trainer(AccumulatingTrainer, ours, **settings), 5)
    assert_same_state(ours, host, rtol=1e-8, atol=1e-9)  # running statistics, too


def test_gradient_is_the_mean_of_the_micro_batches() -> None:
    model = TwoLosses()
    by_hand = copy.deepcopy(model).train()
    for part in split_batch(next(batches()), 4):
        (sum(by_hand(part).values()) / 4).backward()
    run(make_trainer(AccumulatingTrainer, model, num_micro_batches=4), 1)
    for found, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-6)


def test_training_learns() -> None:
    model = TwoLosses(batch_norm=False)
    trainer = make_trainer(AccumulatingTrainer, model, num_micro_batches=4)
    trainer._data_loader_iter = iter([next(batches())] * 30)
    losses = run(trainer, 30)["loss_class"]
    assert losses[-1] < 0.1 * losses[0]


class EveryOtherLoss(nn.Linear):
    """Returns a loss only for images with a label, which a micro-batch may lack."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        output = super().forward(batch["images"].mean((2, 3))).square().sum()
        losses = {"loss_all": output}
        if batch["targets"][0] == 0:
            losses["loss_first"] = 3 * output
        return losses


def test_loss_that_some_micro_batches_lack_counts_as_zero_there() -> None:
    model = EveryOtherLoss(3, 1)
    parts = split_batch(next(batches()), 4)
    first = model(parts[0])["loss_first"].item()
    logged = run(make_trainer(AccumulatingTrainer, model, num_micro_batches=4), 1)
    assert logged["loss_first"] == [pytest.approx(first / 4)]
    assert logged["total_loss"][0] == pytest.approx(
        logged["loss_first"][0] + logged["loss_all"][0]
    )


def test_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = TwoLosses()
    trainer = make_trainer(AccumulatingTrainer, model, num_micro_batches=4)
    batch = next(batches())
    batch["images"][2] = torch.nan  # in the second micro-batch
    trainer._data_loader_iter = iter([batch])
    before = copy.deepcopy(model.classify)
    with pytest.raises(FloatingPointError, match="iteration=0"):
        run(trainer, 1)
    assert_same_state(model.classify, before, rtol=0, atol=0)


def test_model_in_evaluation_mode_is_refused() -> None:
    trainer = make_trainer(AccumulatingTrainer, TwoLosses(), num_micro_batches=2)
    trainer.model.eval()
    with pytest.raises(AssertionError, match="evaluation mode"):
        run(trainer, 1)


def test_no_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_micro_batches .*1.*got 0"):
        make_trainer(AccumulatingTrainer, TwoLosses(), num_micro_batches=0)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_processes_exchange_gradients_once_per_step(num_micro_batches: int) -> None:
    model = TwoLosses()
    wrapped = DistributedDataParallel(model)
    exchanged = []

    def count(state, bucket):
        exchanged.append(bucket.buffer().clone())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, count)
    settings = {"num_micro_batches": num_micro_batches}
    run(make_trainer(AccumulatingTrainer, wrapped, **settings), 3)
    assert len(exchanged) == 3
    plain = TwoLosses()
    run(make_trainer(AccumulatingTrainer, plain, **settings), 3)
    assert_same_state(model, plain, rtol=0, atol=1e-6)


# --- mixed precision ---------------------------------------------------------------------


class RecordingScaler:
    """Replacement of CUDA's gradient scaler: a fixed scale, divided out before the step."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.autocast: list[bool] = []

    def scale(self, loss: Tensor) -> Tensor:
        self.calls.append("scale")
        self.autocast.append(torch.is_autocast_enabled())
        return loss * 1024.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 1024.0
        optimizer.step()

    def update(self) -> None:
        self.calls.append("update")


class InAutocast(TwoLosses):
    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        assert torch.is_autocast_enabled()
        return super().forward(batch)


@pytest.fixture
def cuda_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the mixed precision step run on a CPU, where autocast for CUDA does nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("cuda_in_name")
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_mixed_precision_scales_each_loss_and_steps_once(num_micro_batches: int) -> None:
    ours, plain = InAutocast(), TwoLosses()
    settings = {"num_micro_batches": num_micro_batches}
    trainer = make_trainer(AccumulatingAMPTrainer, ours, **settings)
    trainer.grad_scaler = scaler = RecordingScaler()
    found = run(trainer, 3)
    assert scaler.calls == (["scale"] * num_micro_batches + ["step", "update"]) * 3
    assert not any(scaler.autocast)  # the backward pass runs outside
    # The scale is a power of two: it leaves no trace.
    assert found == run(make_trainer(AccumulatingTrainer, plain, **settings), 3)
    assert_same_state(ours, plain, rtol=0, atol=0)


@pytest.mark.usefixtures("cuda_in_name")
def test_one_micro_batch_equals_amp_trainer_bit_by_bit() -> None:
    logged, models = [], []
    for trainer_class, settings in (
        (AMPTrainer, {}),
        (AccumulatingAMPTrainer, {"num_micro_batches": 1}),
    ):
        models.append(InAutocast())
        trainer = make_trainer(trainer_class, models[-1], **settings)
        trainer.grad_scaler = RecordingScaler()
        logged.append(run(trainer, 5))
    assert logged[0] == logged[1]
    assert_same_state(models[1], models[0], rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled:UserWarning")
def test_mixed_precision_without_cuda_is_refused() -> None:
    trainer = make_trainer(AccumulatingAMPTrainer, TwoLosses(), num_micro_batches=1)
    with pytest.raises(AssertionError, match="AMP"):
        run(trainer, 1)


class OnCuda(TwoLosses):
    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        moved = {
            name: values.cuda() if isinstance(values, Tensor) else values
            for name, values in batch.items()
        }
        return super().forward(moved)


@pytest.mark.gpu
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_mixed_precision_on_a_gpu(num_micro_batches: int) -> None:
    host, ours = (OnCuda(batch_norm=False).cuda() for _ in range(2))
    expected = run(make_trainer(AMPTrainer, host), 5)
    settings = {"num_micro_batches": num_micro_batches}
    found = run(make_trainer(AccumulatingAMPTrainer, ours, **settings), 5)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=0.05)


# --- the real model ----------------------------------------------------------------------


def one_step_of_selcon(cfg: CfgNode, num_micro_batches: int, ghost: int) -> nn.Module:
    cfg = cfg.clone()
    cfg.MODEL.HEADS.NUM_CLASSES = 12
    torch.manual_seed(0)
    model = build_model(cfg).double()
    if ghost:
        convert_ghost_batch_norm(model, ghost)
    model.method.start_epoch(5)  # behind the warm-up, whose negatives are random
    model.method.memory.mixture_bank.normal_()
    images = torch.rand(BATCH, 3, 64, 32, dtype=torch.float64) * 255
    batch = {
        "images": images,
        "targets": torch.arange(BATCH),
        "camids": torch.arange(BATCH) % 3,
        "img_paths": ["a.jpg"] * BATCH,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    trainer = AccumulatingTrainer(
        model, [batch], optimizer, None, num_micro_batches=num_micro_batches
    )
    run(trainer, 1)
    model.update_banks()
    return model


def test_selcon_step_in_parts_equals_the_whole(tiny_cfg: CfgNode) -> None:
    whole = one_step_of_selcon(tiny_cfg, 1, ghost=2)
    in_parts = one_step_of_selcon(tiny_cfg, 4, ghost=0)
    for found, expected in zip(in_parts.parameters(), whole.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None
        else:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
    assert_same_state(in_parts, whole, rtol=1e-5, atol=1e-6)  # banks, too

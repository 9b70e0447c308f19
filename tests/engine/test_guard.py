"""Steps with NaN or infinity: nothing is written, and the message names the cause."""

from __future__ import annotations

import copy
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.ddp import join_group, run_ranks
from selcon_plugin.engine.guard import StepGuard, zero_nonfinite_features
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.features import Embeddings, GlobalPartEmbedding
from selcon_plugin.methods import build_method
from selcon_plugin.models.finite import check_state
from selcon_plugin.models.preprocessing import Preprocessing

IMAGES, BATCH = 12, 4
PATHS = [f"{i:02}.jpg" for i in range(IMAGES)]
NAN, INF = math.nan, math.inf


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


class Training:
    """A small network under guard, trained as a host does it."""

    def __init__(self, device: str = "cpu", **options: Any) -> None:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.network = EmbeddingNetwork(
            backbone,
            GlobalPartEmbedding(8, 8, 2),
            Preprocessing(pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3),
            images_normalized=True,
        )
        self.network.method = build_method(
            "SelectiveContrastive",
            IMAGES,
            8,
            2,
            4,
            num_neighbors=2,
            num_negatives=4,
            warmup_epochs=0,
        )
        self.network.to(device)
        method = self.network.method
        method.prepare(
            Embeddings(unit(IMAGES, 8).to(device), unit(IMAGES, 2, 4).to(device)), None
        )
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.01)
        self.guard = StepGuard(self.network, PATHS, **options)
        self.steps = 0

    def images(self, rows: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.steps)
        return torch.randn(len(rows), 3, 16, 8, generator=generator)

    def step(
        self,
        rows: list[int],
        images: Tensor | None = None,
        *,
        spoil: Any = None,
        micro_batches: int = 1,
        **checking: Any,
    ) -> dict[str, float]:
        images = self.images(rows) if images is None else images
        index, camids = torch.tensor(rows), torch.full((len(rows),), -1)
        self.optimizer.zero_grad()
        self.guard.begin_step()
        losses: dict[str, Tensor] = {}
        pieces = zip(
            *(t.chunk(micro_batches) for t in (images, index, camids)), strict=True
        )
        for piece in pieces:
            found = self.network.losses(*piece)
            (sum(found.values(), start=torch.tensor(0.0)) / micro_batches).backward()
            for name, loss in found.items():
                losses[name] = losses.get(name, 0.0) + loss.detach() / micro_batches
        if spoil is not None:
            spoil(self.network, losses)
        values = self.guard.check(losses, images, self.steps, **checking)
        self.steps += 1
        if self.guard.skipped:
            self.optimizer.zero_grad()
            self.network.clear_pending()
        else:
            self.optimizer.step()
            self.network.update_banks()
        return values

    def state(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.network.state_dict())


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def spoil_gradient(network: nn.Module, losses: dict[str, Tensor]) -> None:
    network.get_parameter("heads.global_projection.weight").grad[0, 0] = NAN


def spoil_loss(network: nn.Module, losses: dict[str, Tensor]) -> None:
    losses["loss_part"] = torch.full_like(losses["loss_part"], INF)


def bad_pixel(training: Training, rows: list[int], place: int) -> Tensor:
    images = training.images(rows)
    images[place, 1, 5, 5] = NAN
    return images


# --- skipped steps -----------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["pixel", "gradient", "loss"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_skipped_step_leaves_no_trace(
    cause: str, micro_batches: int, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run continues as one that never saw the step: weights, statistics, banks."""
    training, unbroken = Training(device), Training(device)
    for run in (training, unbroken):
        run.step([0, 1, 2, 3])
    before, optimizer = training.state(), copy.deepcopy(training.optimizer.state_dict())
    rows = [4, 5, 6, 7]
    if cause == "pixel":
        training.step(rows, bad_pixel(training, rows, 2), micro_batches=micro_batches)
    else:
        spoil = spoil_gradient if cause == "gradient" else spoil_loss
        training.step(rows, spoil=spoil, micro_batches=micro_batches)
    assert training.guard.skipped
    assert_equal(before, training.state())
    assert str(optimizer) == str(training.optimizer.state_dict())
    assert caplog.text.count("Skipped step 2: ") == 1
    unbroken.steps += 1
    for run in (training, unbroken):
        run.step([8, 9, 10, 11], micro_batches=micro_batches)
        assert not run.guard.skipped
    assert_equal(unbroken.state(), training.state())


def test_good_steps_are_those_without_a_guard() -> None:
    """The check reads and never writes; it returns the losses, which are read anyway."""
    guarded, free = Training(), Training()
    losses = []
    for step in range(3):
        rows = [(3 * step + i) % IMAGES for i in range(BATCH)]
        losses.append(guarded.step(rows))
        index, camids = torch.tensor(rows), torch.full((BATCH,), -1)
        free.optimizer.zero_grad()
        expected = free.network.losses(free.images(rows), index, camids)
        sum(expected.values(), start=torch.tensor(0.0)).backward()
        free.optimizer.step()
        free.network.update_banks()
        free.steps += 1
        assert losses[-1] == {name: loss.item() for name, loss in expected.items()}
    assert_equal(free.state(), guarded.state())


def test_loss_scalers_own_skips_are_not_counted() -> None:
    training = Training(on_nonfinite="stop")
    training.step([0, 1, 2, 3], spoil=spoil_gradient, check_gradients=False)
    assert not training.guard.skipped
    assert training.guard.num_skipped == 0


# --- messages ----------------------------------------------------------------------------


def message_of(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.records[-1].getMessage()


def test_bad_pixels_are_named_by_image(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    rows = [4, 9, 6, 7]
    training.step(rows, bad_pixel(training, rows, 1))
    text = message_of(caplog)
    assert "pixels are not finite in 09.jpg;" in text
    assert "loss_global is nan; loss_part is nan" in text
    # Batch normalization spreads it.
    assert "no feature of the batch is finite: 04.jpg, 09.jpg, 06.jpg, 07.jpg" in text


def test_bad_features_are_named_by_image(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    for module in training.network.modules():  # so that images do not see each other
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    rows = [4, 9, 6, 7]
    training.step(rows, bad_pixel(training, rows, 3))
    assert "features are not finite in 07.jpg" in message_of(caplog)


def test_bad_gradients_are_named_by_weight(caplog: pytest.LogCaptureFixture) -> None:
    Training().step([0, 1, 2, 3], spoil=spoil_gradient)
    text = message_of(caplog)
    assert "gradients are not: heads.global_projection.weight;" in text
    assert "batch of 00.jpg, 01.jpg, 02.jpg, 03.jpg" in text


def test_bad_loss_is_named(caplog: pytest.LogCaptureFixture) -> None:
    Training().step([0, 1, 2, 3], spoil=spoil_loss)
    text = message_of(caplog)
    assert "loss_part is inf; batch of 00.jpg" in text
    assert "loss_global" not in text


# --- stopping ----------------------------------------------------------------------------


def test_option_stops_at_once() -> None:
    training = Training(on_nonfinite="stop")
    before = training.state()
    with pytest.raises(FloatingPointError, match=r"step 1: loss_part is inf.*Resume from"):
        training.step([0, 1, 2, 3], spoil=spoil_loss)
    assert_equal(before, training.state())


def test_too_many_in_a_row_stop_the_run() -> None:
    training = Training(max_nonfinite_steps=3)
    for _ in range(2):
        training.step([0, 1, 2, 3], spoil=spoil_loss)
    training.step([0, 1, 2, 3])  # a good one: the count starts over
    for _ in range(2):
        training.step([0, 1, 2, 3], spoil=spoil_loss)
    with pytest.raises(
        FloatingPointError, match=r"3 such steps in a row \(max_nonfinite_steps\)"
    ):
        training.step([0, 1, 2, 3], spoil=spoil_loss)
    assert training.guard.num_skipped == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("method.memory.mixture_bank", r"mixture_bank is not finite in rows 7 \(07.jpg\)"),
        ("backbone.0.weight", r"weights are not finite: backbone.0.weight"),
    ],
)
def test_spoilt_weights_and_banks_stop_the_run_in_any_case(name: str, words: str) -> None:
    training = Training()
    training.network.state_dict()[name][7, 0] = NAN
    with pytest.raises(
        FloatingPointError, match=f"step 1: .*{words}.*Resume from the last"
    ):
        training.step(list(range(IMAGES)))


# --- loaded weights ----------------------------------------------------------------------


def test_state_is_checked_by_name() -> None:
    training = Training()
    check_state(training.network, PATHS, when="before training")
    state = training.network.state_dict()
    state["method.memory.global_bank"][[2, 5]] = INF
    state["backbone.1.running_var"][0] = NAN
    with pytest.raises(
        FloatingPointError,
        match=r"before training: weights are not finite: backbone.1.running_var; "
        r"method.memory.global_bank is not finite in rows 2 \(02.jpg\), 5 \(05.jpg\). Use",
    ):
        check_state(training.network, PATHS, when="before training")


# --- extracted features ------------------------------------------------------------------


def test_finite_features_are_not_changed() -> None:
    embeddings = Embeddings(unit(IMAGES, 8), unit(IMAGES, 2, 4))
    kept, left_out = zero_nonfinite_features(embeddings, PATHS, "stop")
    assert kept is embeddings
    assert not len(left_out)


def test_bad_features_become_zero_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    features, parts = unit(IMAGES, 8), unit(IMAGES, 2, 4)
    features[3, 1], parts[8, 0, 2] = INF, NAN
    embeddings = Embeddings(features.clone(), parts.clone())
    kept, left_out = zero_nonfinite_features(embeddings, PATHS, "skip")
    assert left_out.tolist() == [3, 8]
    assert "Features of 2 of 12 training images are not finite: 03.jpg, 08.jpg" in (
        caplog.text
    )
    assert kept.part_features is not None
    for row in range(IMAGES):
        expected = 0.0 if row in (3, 8) else 1.0
        assert kept.global_features[row].norm().item() == pytest.approx(expected)
        assert kept.part_features[row].norm(dim=1).tolist() == pytest.approx([expected] * 2)
    with pytest.raises(FloatingPointError, match=r"03.jpg, 08.jpg. Resume"):
        zero_nonfinite_features(embeddings, PATHS, "stop")
    features[:] = NAN
    with pytest.raises(FloatingPointError, match="12 of 12 training images"):
        zero_nonfinite_features(Embeddings(features, parts), PATHS, "skip")


# --- several processes -------------------------------------------------------------------


def work(process: int, folder: Path) -> None:
    join_group(process, folder)
    handler = logging.FileHandler(folder / f"{process}.log")
    logging.getLogger("selcon_plugin").addHandler(handler)
    training = Training(max_nonfinite_steps=2)
    rows = [[0, 1], [2, 3]][process]
    training.step(rows)
    # Non-finite on one rank only: both must skip the step.
    images = bad_pixel(training, rows, 0) if process == 1 else None
    training.step(rows, images)
    skipped = training.guard.skipped
    stopped = False
    try:
        training.step(rows, spoil=spoil_loss if process == 0 else None)
    except FloatingPointError:
        stopped = True
    torch.save(
        (skipped, stopped, training.network.method.state_dict()), f"{folder}/{process}"
    )
    dist.destroy_process_group()


def test_processes_decide_alike(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    first, second = (torch.load(tmp_path / str(process)) for process in range(2))
    assert first[:2] == second[:2] == (True, True)
    assert int(first[2]["_step"]) == 1
    for name, value in first[2].items():
        assert torch.equal(value, second[2][name]), name
    logs = [(tmp_path / f"{process}.log").read_text() for process in range(2)]
    assert "pixels are not finite in 02.jpg" in logs[0]
    assert logs[0] == logs[1]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

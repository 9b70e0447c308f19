"""Gradient accumulation in FastReID's training loop: a large batch on a small GPU."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from fastreid.engine.train_loop import AMPTrainer, SimpleTrainer
from fastreid.utils.params import ContiguousParams
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selcon_plugin.engine.batches import split_batch
from selcon_plugin.engine.guard import StepGuard


class AccumulatingTrainer(SimpleTrainer):
    """FastReID's ``SimpleTrainer`` with each batch in parts, and one optimizer step.

    The gradient is the mean of the micro-batches' gradients: that of the whole batch where
    the loss is a mean over images that do not see each other. Batch norm sees a micro-batch
    at a time, as on a batch of that size. Losses are logged once per step, averaged.
    Under ``DistributedDataParallel`` gradients are exchanged once per step.

    With one micro-batch it does what ``SimpleTrainer`` does.

    With a guard, a step with NaN or infinity in it is not taken; without, FastReID stops.

    Args:
        model: Maps a batch to losses by name; called once per micro-batch.
        data_loader: Endless; yields whole batches.
        optimizer: Steps once per batch.
        param_wrapper: As in FastReID's trainers.
        num_micro_batches: Parts of each batch; must divide the number of its images.
        autocast_dtype: Half precision that the forward pass may use; None for none.

    Attributes:
        guard: Judges each step; None for none.

    Raises:
        ValueError: If ``num_micro_batches`` is below 1.
    """

    _scales_loss = False

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        param_wrapper: Any,
        *,
        num_micro_batches: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if num_micro_batches < 1:
            raise ValueError(
                f"num_micro_batches must be 1 or more, got {num_micro_batches}"
            )
        super().__init__(model, data_loader, optimizer, param_wrapper)
        self.num_micro_batches = num_micro_batches
        self._autocast_dtype = autocast_dtype
        self._device_type = next(model.parameters()).device.type
        self.guard: StepGuard | None = None

    def run_step(self) -> None:
        """Train on one batch of the loader."""
        assert self.model.training, "the model was changed to evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        if self.guard is not None:
            self.guard.begin_step()
        *without_exchange, last = split_batch(batch, self.num_micro_batches)
        metrics: dict[str, Tensor] = {}
        with self._no_exchange():
            for micro_batch in without_exchange:
                self._backward(self._losses(micro_batch, metrics))
        self._backward(self._losses(last, metrics))
        if not self._may_step(metrics, batch):
            self.optimizer.zero_grad()
            return
        self._write_metrics(metrics, data_time)
        self._update_weights()
        if isinstance(self.param_wrapper, ContiguousParams):
            self.param_wrapper.assert_buffer_is_valid()

    def _may_step(self, metrics: dict[str, Tensor], batch: dict[str, Any]) -> bool:
        """Read the losses, and have the step judged."""
        if self.guard is None:
            values = {name: loss.item() for name, loss in metrics.items()}
        else:
            # A loss scaler looks at the gradients itself, and skips a step now and then.
            values = self.guard.judge(
                metrics, batch["images"], self.iter, check_gradients=not self._scales_loss
            )
        # On the CPU from here on: FastReID reads them on a CUDA stream of its own, which
        # would not wait for the one that computes them.
        metrics.update(
            (name, torch.tensor(value, dtype=torch.float64))
            for name, value in values.items()
        )
        return self.guard is None or not self.guard.skipped

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _losses(self, micro_batch: dict[str, Any], metrics: dict[str, Tensor]) -> Tensor:
        """Return a micro-batch's share of the batch's loss; add up the losses by name."""
        losses = self._forward(micro_batch)
        for name, loss in losses.items():
            share = loss.detach() / self.num_micro_batches
            metrics[name] = metrics[name] + share if name in metrics else share
        total = sum(losses.values())
        assert isinstance(total, Tensor), "the model returned no losses"
        return total / self.num_micro_batches

    def _forward(self, micro_batch: dict[str, Any]) -> dict[str, Tensor]:
        with self.autocast():
            losses: dict[str, Tensor] = self.model(micro_batch)
        return losses

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the network runs, also to extract features."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=self._autocast_dtype)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update_weights(self) -> None:
        self.optimizer.step()


class AccumulatingAMPTrainer(AccumulatingTrainer, AMPTrainer):
    """FastReID's ``AMPTrainer`` with each batch in parts, and one optimizer step.

    Mixed precision in float16, on CUDA: the loss scale is the same for all micro-batches of
    a batch and changes once per step. Otherwise as :class:`AccumulatingTrainer`, which does
    bfloat16, whose range needs no loss scale.
    """

    _scales_loss = True

    def run_step(self) -> None:
        """Train on one batch of the loader."""
        assert torch.cuda.is_available(), "SOLVER.AMP.ENABLED needs CUDA"
        super().run_step()

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the network runs, also to extract features."""
        return torch.autocast("cuda")

    def _backward(self, loss: Tensor) -> None:
        super()._backward(self.grad_scaler.scale(loss))

    def _update_weights(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

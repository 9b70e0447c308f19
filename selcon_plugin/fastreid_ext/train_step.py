"""Training step in FastReID's loop, with micro-batches, mixed precision and its log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import torch
from fastreid.engine.train_loop import AMPTrainer, SimpleTrainer
from fastreid.utils import comm
from fastreid.utils.params import ContiguousParams
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selcon_plugin.engine.guard import StepGuard
from selcon_plugin.engine.step import take_step


def distribute(model: nn.Module) -> nn.Module:
    """Wrap a model for training by several processes, on GPUs or CPUs.

    Args:
        model: The model.

    Returns:
        The wrapped model, or the model itself if there is one process.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [comm.get_local_rank()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


class AccumulatingTrainer(SimpleTrainer):
    """FastReID's ``SimpleTrainer`` with gradient accumulation over micro-batches.

    A step is :func:`selcon_plugin.engine.step.take_step`; the mean losses are logged once
    per step. With one micro-batch it does the same as ``SimpleTrainer``.

    Args:
        model: Maps a batch to losses by name; called once per micro-batch.
        data_loader: Infinite loader of whole batches.
        optimizer: Optimizer, which steps once per batch.
        param_wrapper: Wrapper of the parameters, as in FastReID's trainers.
        num_micro_batches: Number of micro-batches per batch; must divide the number of its
            images.
        autocast_dtype: Half precision of the forward pass, or None.
        guard: Checks each step and skips those with NaN or infinity; without a guard
            FastReID stops on a non-finite loss.

    Raises:
        ValueError: If ``num_micro_batches`` is below 1.
    """

    grad_scaler: Any = None

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        param_wrapper: Any,
        *,
        num_micro_batches: int,
        autocast_dtype: torch.dtype | None = None,
        guard: StepGuard | None = None,
    ) -> None:
        if num_micro_batches < 1:
            raise ValueError(
                f"num_micro_batches must be 1 or more, got {num_micro_batches}"
            )
        super().__init__(model, data_loader, optimizer, param_wrapper)
        self.num_micro_batches = num_micro_batches
        self._autocast_dtype = autocast_dtype
        self._device_type = next(model.parameters()).device.type
        self._guard = guard

    def run_step(self) -> None:
        """Train on one batch of the loader."""
        assert self.model.training, "the model was changed to evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        def log(losses: Mapping[str, float]) -> None:
            # They are on the CPU, because FastReID reads them in its own CUDA stream, which
            # would not wait for the stream that computes them.
            on_cpu = {
                name: torch.tensor(value, dtype=torch.float64)
                for name, value in losses.items()
            }
            self._write_metrics(on_cpu, data_time)

        take_step(
            self._forward,
            batch,
            self.optimizer,
            images_name="images",
            step=self.iter,
            model=self.model,
            num_micro_batches=self.num_micro_batches,
            guard=self._guard,
            scaler=self.grad_scaler,
            before_update=log,
        )
        if isinstance(self.param_wrapper, ContiguousParams):
            self.param_wrapper.assert_buffer_is_valid()

    def _forward(self, micro_batch: dict[str, Any]) -> dict[str, Tensor]:
        with self.autocast():
            losses: dict[str, Tensor] = self.model(micro_batch)
        return losses

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the autocast context for training and for the extraction of features."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=self._autocast_dtype)


class AccumulatingAMPTrainer(AccumulatingTrainer, AMPTrainer):
    """FastReID's ``AMPTrainer`` with gradient accumulation over micro-batches.

    It uses mixed precision in float16 on CUDA: the loss scale is the same for all
    micro-batches of a batch and changes once per step. Otherwise it equals
    :class:`AccumulatingTrainer`, which supports bfloat16, whose range needs no loss scale.
    """

    def run_step(self) -> None:
        """Train on one batch of the loader."""
        assert torch.cuda.is_available(), "SOLVER.AMP.ENABLED needs CUDA"
        super().run_step()

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the autocast context for training and for the extraction of features."""
        return torch.autocast("cuda")

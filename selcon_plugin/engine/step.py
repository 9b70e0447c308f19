"""One training step, which both hosts share: micro-batches, losses, guard, weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from selcon_plugin.engine.batches import split_batch
from selcon_plugin.engine.guard import StepGuard

Batch = dict[str, Any]
Losses = Mapping[str, Tensor]


def take_step(
    compute_losses: Callable[[Batch], Losses],
    batch: Batch,
    optimizer: Optimizer,
    *,
    images_name: str,
    step: int,
    model: nn.Module,
    num_micro_batches: int = 1,
    guard: StepGuard | None = None,
    scaler: Any = None,
    total_name: str = "",
    before_update: Callable[[Mapping[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train the weights on one batch.

    ``TrainingRun.after_step`` updates banks and teacher later, once the host has logged.

    The gradient is the mean of the micro-batches' gradients. It equals that of the whole
    batch if the loss is a mean over images that do not interact. Batch norm sees one
    micro-batch at a time, as with a batch of that size. Under ``DistributedDataParallel``
    the processes exchange gradients once, with the last micro-batch.

    A step that the guard refuses changes no weight, and its gradients are dropped.

    Args:
        compute_losses: Maps a batch to its losses by name, scalars with gradient; called
            once per micro-batch.
        batch: Tensors and lists by name, each with one entry per image.
        optimizer: Optimizer, which takes one step.
        images_name: Key of the images in the batch, which the guard searches for the cause
            of a non-finite value.
        step: Number of steps before this one.
        model: Module that ``compute_losses`` runs, wrapped in ``DistributedDataParallel``
            if several processes train it.
        num_micro_batches: Number of micro-batches; must divide the number of images.
        guard: Checks the step before a weight changes; None for no check.
        scaler: Scales the losses of a forward pass in float16, or None. It checks the
            gradients itself and occasionally skips a step, so that the guard does not check
            them.
        total_name: Key under which the sum of the losses is returned; empty to omit it.
        before_update: Called with the losses of a step that is taken, before the weights
            change.

    Returns:
        The losses of this process by name, each the mean over the micro-batches. A loss
        that a micro-batch lacks counts as zero there.

    Raises:
        FloatingPointError: If the guard stops the run.
        RuntimeError: If there are no losses.
    """  # noqa: DOC502  (the guard raises the first)
    optimizer.zero_grad()
    if guard is not None:
        guard.begin_step()
    *without_exchange, last = split_batch(batch, num_micro_batches)
    means: dict[str, Tensor] = {}

    def train_on(micro_batch: Batch) -> None:
        losses = dict(compute_losses(micro_batch))
        if not losses:
            raise RuntimeError("the model returned no losses in training mode")
        total = torch.stack(list(losses.values())).sum()
        _backward(total / num_micro_batches, scaler)
        if total_name:
            losses[total_name] = total
        for name, loss in losses.items():
            part = loss.detach() / num_micro_batches
            means[name] = means[name] + part if name in means else part

    with _no_exchange(model):
        for micro_batch in without_exchange:
            train_on(micro_batch)
    train_on(last)
    values = _read(means, batch[images_name], step, guard, check_gradients=scaler is None)
    if guard is not None and guard.skipped:
        optimizer.zero_grad()
        return values
    if before_update is not None:
        before_update(values)
    _update_weights(optimizer, scaler)
    return values


def _no_exchange(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _backward(loss: Tensor, scaler: Any) -> None:
    (loss if scaler is None else scaler.scale(loss)).backward()


def _read(
    losses: Losses,
    images: Tensor,
    step: int,
    guard: StepGuard | None,
    *,
    check_gradients: bool,
) -> dict[str, float]:
    """Read the losses from the device, and let the guard decide on the step."""
    if guard is None:
        return {name: loss.item() for name, loss in losses.items()}
    return guard.check(losses, images, step, check_gradients=check_gradients)


def _update_weights(optimizer: Optimizer, scaler: Any) -> None:
    if scaler is None:
        optimizer.step()
        return
    scaler.step(optimizer)
    scaler.update()

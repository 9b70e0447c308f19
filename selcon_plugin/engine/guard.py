"""Guard against non-finite values, which stops them before they reach weights or banks.

A step is checked between the backward pass and the optimizer's step: its losses, the
batch's features and the gradients. They are read from the device in one transfer and
gathered from all processes, so that all skip the same steps. A skipped step changes
nothing: no weight, no bank, no teacher and no running statistic of a normalization layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selcon_plugin.distributed import gather_batch, rank, world_size
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.features import Embeddings
from selcon_plugin.models.finite import (
    broadcast_rows,
    find_nonfinite_state,
    finite_rows,
    name_some,
)

logger = logging.getLogger(__name__)

SKIP, STOP = "skip", "stop"
_RESUME = "Resume from the last checkpoint"
_LOWER_RATE = (
    "If it happens again, lower the learning rate, or train without mixed precision"
)


class StepGuard:
    """Check of each training step for non-finite values, before anything is written.

    ::

        guard.begin_step()
        losses, backward                                    done by the host
        values = guard.check(losses, images, step)          raises if the run must stop
        if guard.skipped: drop the gradients
        else: optimizer.step()

    Args:
        network: Network in training, with its method.
        paths: Path of each training image.
        on_nonfinite: ``"skip"`` or ``"stop"``.
        max_nonfinite_steps: Consecutive skipped steps after which the run stops even with
            ``"skip"``.

    Attributes:
        skipped: Whether the last step must be skipped.
        num_skipped: Number of steps that this process has skipped so far.
    """

    def __init__(
        self,
        network: EmbeddingNetwork,
        paths: Sequence[str],
        *,
        on_nonfinite: str = SKIP,
        max_nonfinite_steps: int = 10,
    ) -> None:
        self._network = network
        self._paths = paths
        self._stops = on_nonfinite == STOP
        self._max_nonfinite_steps = max_nonfinite_steps
        self.skipped = False
        self.num_skipped = 0
        self._in_a_row = 0
        self._buffers: list[tuple[list[Tensor], Tensor]] = []

    def begin_step(self) -> None:
        """Save the buffers that a forward pass changes: running statistics and counters."""
        self.skipped = False
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for module in (self._network.backbone, self._network.heads):
            for buffer in module.buffers():
                by_type.setdefault(buffer.dtype, []).append(buffer)
        # The buffers are concatenated: this takes a few kernels, not one per buffer.
        self._buffers = [
            (buffers, torch.cat([buffer.reshape(-1) for buffer in buffers]))
            for buffers in by_type.values()
        ]

    def check(
        self,
        losses: Mapping[str, Tensor],
        images: Tensor,
        step: int,
        *,
        check_gradients: bool = True,
    ) -> dict[str, float]:
        """Read the losses and decide whether the step may be taken.

        All processes must call this method after the backward pass. It synchronizes with
        the device once.

        Args:
            losses: Scalars by name, of this process.
            images: Batch of images, which is searched for the cause.
            step: Number of steps before this one, for the message.
            check_gradients: Whether gradients must be finite. Pass False with a loss
                scaler, which checks them itself and skips steps as part of its normal work.

        Returns:
            The losses of this process, by name. :attr:`skipped` holds the decision.

        Raises:
            FloatingPointError: If there is a NaN or infinity and the run must stop: because
                of the option, after too many skipped steps in a row, or because weights or
                banks are non-finite, which skipping a step cannot repair.
        """  # noqa: DOC502  (raised by the functions called here)
        names = [*losses, "features"]
        values = [*losses.values(), self._sum_of_features()]
        if check_gradients and (gradients := _gradients(self._network)):
            names.append("gradients")
            norms = torch._foreach_norm(gradients)
            values.append(torch.stack([norm.float() for norm in norms]).sum())
        rows = _of_all_ranks(torch.stack([value.detach().float() for value in values]))
        if all(math.isfinite(value) for row in rows for value in row):
            self._in_a_row = 0
        else:
            self._refuse(names, rows, images, step)
        own = rows[rank()]
        return dict(zip(losses, own, strict=False))

    def _sum_of_features(self) -> Tensor:
        """Return a value that is finite if all features, which are unit vectors, are."""
        features = self._network.pending_batch().embeddings
        return sum(
            (part.float().sum() for part in features if part is not None),
            start=torch.zeros((), device=self._network.device),
        )

    def _refuse(
        self, names: list[str], rows: list[list[float]], images: Tensor, step: int
    ) -> None:
        self.skipped = True
        self.num_skipped += 1
        self._in_a_row += 1
        # This comes first: running statistics that this step has spoiled are not its cause.
        self._restore_buffers()
        found = self._describe(names, rows, images)
        broken = find_nonfinite_state(self._network, self._paths)
        message = f"step {step + 1}: {'; '.join(found + broken)}"
        if broken:
            raise FloatingPointError(
                f"{message}. No later step can recover from this. {_RESUME}"
            )
        if self._stops:
            raise FloatingPointError(
                f"{message}. The step changed no weight and no bank. {_RESUME}, with "
                "on_nonfinite 'skip' to train without such steps"
            )
        if self._in_a_row >= self._max_nonfinite_steps:
            raise FloatingPointError(
                f"{message}. These were {self._in_a_row} such steps in a row "
                f"(max_nonfinite_steps). {_RESUME}, with a lower learning rate"
            )
        logger.warning(
            "Skipped %s. It changed no weight and no bank. %s", message, _LOWER_RATE
        )

    def _restore_buffers(self) -> None:
        for buffers, before in self._buffers:
            pieces = torch.split(before, [buffer.numel() for buffer in buffers])
            for buffer, piece in zip(buffers, pieces, strict=True):
                buffer.copy_(piece.view_as(buffer))

    def _describe(
        self, names: list[str], rows: list[list[float]], images: Tensor
    ) -> list[str]:
        """Describe the non-finite values and their images; the same text on all ranks."""
        nonfinite = {
            name: value
            for row in rows
            for name, value in zip(names, row, strict=True)
            if not math.isfinite(value)
        }
        found = [
            f"{name} is {value}"
            for name, value in nonfinite.items()
            if name not in ("features", "gradients")
        ]
        seen = self._network.pending_batch()
        index, embeddings = seen.index, seen.embeddings
        every = gather_batch(index)
        of_pixels = gather_batch(index[~finite_rows(images.to(index.device))])
        of_features = gather_batch(index[~_finite_embeddings(embeddings)])
        if len(of_pixels):
            found.append(f"pixels are not finite in {self._named(of_pixels)}")
        if len(of_features) == len(every):
            # In training mode one such image spoils the batch through its statistics.
            found.append(f"no feature of the batch is finite: {self._named(every)}")
        elif len(of_features):
            found.append(f"features are not finite in {self._named(of_features)}")
        else:
            found.append(f"batch of {self._named(every)}")
        if set(nonfinite) == {"gradients"}:
            gradients = self._nonfinite_gradients()
            found.insert(0, f"losses are finite, but gradients are not: {gradients}")
        return found

    def _named(self, index: Tensor) -> str:
        return name_some([self._paths[i] for i in index.tolist()])

    def _nonfinite_gradients(self) -> str:
        return name_some(
            [
                name
                for name, weight in self._network.named_parameters()
                if weight.grad is not None and not bool(weight.grad.isfinite().all())
            ]
        )


def zero_nonfinite_features(
    embeddings: Embeddings, paths: Sequence[str], on_nonfinite: str
) -> tuple[Embeddings, Tensor]:
    """Check the features of all training images, and replace non-finite ones by zeros.

    A zero row is equally far from all others and adds nothing to a mean.

    Args:
        embeddings: Features of images 0..M-1.
        paths: Path of each image.
        on_nonfinite: ``"skip"`` or ``"stop"``.

    Returns:
        Finite embeddings, and the indices of the images whose features were replaced,
        ``(n,)``.

    Raises:
        FloatingPointError: If a feature is NaN or infinite and ``on_nonfinite`` is
            ``"stop"``, or if no feature is finite.
    """
    finite = _finite_embeddings(embeddings)
    replaced = (~finite).nonzero().squeeze(1)
    if not len(replaced):
        return embeddings, replaced
    message = (
        f"Features of {len(replaced)} of {len(finite)} training images are not finite: "
        f"{name_some([paths[i] for i in replaced.tolist()])}"
    )
    if on_nonfinite == STOP or len(replaced) == len(finite):
        raise FloatingPointError(f"{message}. {_RESUME}, with a lower learning rate")
    if rank() == 0:
        logger.warning(
            "%s. These images belong to no cluster until their features are finite", message
        )
    kept = [
        None if part is None else part.masked_fill(broadcast_rows(~finite, part), 0.0)
        for part in embeddings
    ]
    global_features, part_features = kept
    assert global_features is not None
    return Embeddings(global_features, part_features), replaced


def _finite_embeddings(embeddings: Embeddings) -> Tensor:
    finite = finite_rows(embeddings.global_features)
    if embeddings.part_features is not None:
        finite = finite & finite_rows(embeddings.part_features)
    return finite


def _gradients(module: nn.Module) -> list[Tensor]:
    return [weight.grad for weight in module.parameters() if weight.grad is not None]


def _of_all_ranks(values: Tensor) -> list[list[float]]:
    """Return the values of all ranks, ``(ranks, n)``, on every rank."""
    rows = [torch.empty_like(values) for _ in range(world_size())]
    if len(rows) > 1:
        dist.all_gather(rows, values)
    else:
        rows = [values]
    result: list[list[float]] = torch.stack(rows).tolist()
    return result

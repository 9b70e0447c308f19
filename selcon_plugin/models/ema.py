"""An exponential moving average of the network: the teacher of a student in training.

Tarvainen and Valpola, "Mean teachers are better role models: Weight-averaged consistency
targets improve semi-supervised deep learning results", 2017.
https://arxiv.org/abs/1703.01780
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class EMATeacher(nn.Module):
    r"""A copy of the student whose weights follow the student's slowly.

    Update n = 1, 2, ... moves each weight t of the teacher towards the student's weight s:

    .. math:: t \leftarrow d \cdot t + (1 - d) \cdot s, \qquad d = \min(decay, 1 - 1/n)

    Buffers (running statistics, counters) are copied. For the first 1 / (1 - decay) updates
    the teacher is therefore the plain mean of the student's weights since training began.
    With a constant decay the weights before the first step would remain in it: at decay
    0.999 they would make up 82 % after an epoch of 200 steps, when the teacher's features
    are clustered, and 37 % after five. Later the two forms agree.

    The teacher has no gradients and stays in evaluation mode whatever is passed to
    :meth:`train`. Its weights, buffers and number of updates are part of the state dict.

    Args:
        student_modules: The module to copy, for instance a backbone, or several modules in
            an ``nn.ModuleDict``.
        decay: Weight of the old value, in [0, 1). 0 makes the teacher the student itself.

    Attributes:
        module: The averaged copy.
        decay: As above.
        step: Updates since the start or the last :meth:`reset`.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).
    """

    _step: Tensor

    def __init__(self, student_modules: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(
                f"decay must be at least 0 and below 1, got {decay}; 0.999 is usual"
            )
        self.decay = decay
        self.module = copy.deepcopy(student_modules).requires_grad_(False)
        self.register_buffer("_step", torch.zeros((), dtype=torch.int64))
        # This is a plain copy of the counter: reading a buffer on a GPU would make every
        # step wait for the device.
        self.step = 0
        self.register_load_state_dict_post_hook(self._read_step)  # type: ignore[no-untyped-call, unused-ignore]
        self.eval()

    @staticmethod
    def _read_step(module: nn.Module, _incompatible: Any) -> None:
        assert isinstance(module, EMATeacher)
        module.step = int(module._step)

    def extra_repr(self) -> str:
        """Describe the settings in ``print(model)``."""
        return f"decay={self.decay}"

    def train(self, mode: bool = True) -> EMATeacher:
        """Stay in evaluation mode, although the network around the teacher changes its."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged copy, without gradients."""
        return self.module(*args, **kwargs)

    def update(self, student_modules: nn.Module) -> None:
        """Move towards the student; call this once after each optimizer step.

        Args:
            student_modules: The module that the teacher was copied from, or one with the
                same parameters and buffers (ValueError otherwise), on the same device.
        """
        # In the plain mean of n values the last one has the weight 1/n.
        share = max(1.0 - self.decay, 1.0 / (self.step + 1))
        self._follow(student_modules, share)
        self._set_step(self.step + 1)

    def reset(self, student_modules: nn.Module) -> None:
        """Start over from the current student, for instance after loading other weights.

        Args:
            student_modules: As for :meth:`update`.
        """
        self._follow(student_modules, 1.0)
        self._set_step(0)

    @torch.no_grad()
    def _follow(self, student_modules: nn.Module, share: float) -> None:
        own, other = _named_tensors(self.module), _named_tensors(student_modules)
        differing = sorted({name for name, _ in _shapes(own) ^ _shapes(other)})
        if differing:
            raise ValueError(
                "student_modules has other parameters or buffers than the teacher: "
                f"{', '.join(differing[:5])}. Update the teacher with the module that it "
                "was copied from"
            )
        weights = [name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)]
        if weights:
            torch._foreach_lerp_(_select(own, weights), _select(other, weights), share)
        buffers = [name for name in own if not isinstance(own[name], nn.Parameter)]
        if buffers:
            torch._foreach_copy_(_select(own, buffers), _select(other, buffers))

    def _set_step(self, step: int) -> None:
        self.step = step
        self._step.fill_(step)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shapes(tensors: dict[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in tensors.items()}


def _select(tensors: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    return [tensors[name] for name in names]

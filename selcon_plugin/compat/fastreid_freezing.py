"""Patch that makes FastReID's frozen layers resumable."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from selcon_plugin.compat.shared import PATCHED

_ENTRY = "frozen_steps"  # in the optimizer's state dict
_FREEZE = "freeze"  # FastReID's mark of a frozen parameter group


def count_frozen_steps_in_optimizer() -> None:
    """Keep the number of steps with frozen layers in the optimizer and its state dict.

    Without it: a run with ``SOLVER.FREEZE_ITERS`` that resumes freezes its layers for that
    many steps once more, because FastReID counts them in a closure, which no checkpoint
    contains.
    Can be removed when: FastReID's checkpoints contain the number.
    """
    build: Any = importlib.import_module("fastreid.solver.build")
    if hasattr(build._generate_optimizer_class_with_freeze_layer, PATCHED):
        return
    setattr(_class_with_frozen_steps, PATCHED, True)
    build._generate_optimizer_class_with_freeze_layer = _class_with_frozen_steps


def _class_with_frozen_steps(kind: Any, *, freeze_iters: int = 0) -> Any:
    """Replace FastReID's function of the same purpose."""

    class Freezing(kind):  # type: ignore[misc]
        """Optimizer whose first steps leave the frozen parameter groups unchanged.

        Attributes:
            frozen_steps: Number of those steps that are done; None after the state of a
                checkpoint without this number was loaded.
        """

        frozen_steps: int | None = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.frozen_steps = 0

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if self.frozen_steps is None or self.frozen_steps >= freeze_iters:
                return super().step(closure)
            self.frozen_steps += 1
            frozen = [
                (parameter, parameter.grad)
                for group in self.param_groups
                if group["freeze_status"] == _FREEZE
                for parameter in group["params"]
            ]
            for parameter, _ in frozen:
                parameter.grad = None  # neither momentum nor weight decay moves it
            try:
                return super().step(closure)
            finally:
                for parameter, gradient in frozen:
                    parameter.grad = gradient

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), _ENTRY: self.frozen_steps}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.frozen_steps = state_dict.get(_ENTRY)

    Freezing.__name__ = Freezing.__qualname__ = f"{kind.__name__}WithFreezeLayer"
    return Freezing

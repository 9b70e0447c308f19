"""Refusal of supervised loops around a network that trains without identities.

A host's own trainer would take identities for indices of images, or features for logits,
and would never write the banks. Each step of such a loop looks valid by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FEW = 16
_LOOP = (
    "Train with SelConTrainer or selcon train (FastReID), or with ImageSelConEngine "
    "(torchreid); selcon run SCRIPT does so for a script of FastReID's"
)
_UNWRITTEN = f"the banks were not written after the last training step. {_LOOP}"
SUPERVISED = f"A supervised loop trains this network, which has no identities. {_LOOP}"


class StepCheck:
    """Check that each training step is one of a label-free training.

    The plugin's own loop opens each step. In another loop a step is recognized by weights
    that have changed.
    """

    def __init__(self) -> None:
        # Batches that the open step may still see; 0 between steps, None in a loop that
        # does not open its steps.
        self._expected: int | None = None
        self._weights_seen = torch.empty(0)
        self._weights_used: Tensor | None = None

    def open(self, num_batches: int, pending: Sequence[Any]) -> None:
        """Open a step of a number of batches; raise if batches are pending."""
        if pending:
            raise RuntimeError(_UNWRITTEN)
        self._expected = num_batches

    def close(self) -> None:
        """Close the step, if the loop has opened it."""
        self._expected = None if self._expected is None else 0

    def check_features_only(self, network: Any) -> None:
        """Refuse a second step of a loop that never asks for the losses.

        Args:
            network: The network in training.

        Raises:
            RuntimeError: If its weights have changed since the last call.
        """
        if self._expected:
            return
        weights = _some_weights(network)
        if self._weights_used is None:
            self._weights_used = weights
        elif not torch.equal(weights, self._weights_used):
            raise RuntimeError(SUPERVISED)

    def check_batch(self, network: Any, index: Tensor, pending: Sequence[Any]) -> None:
        """Refuse a batch that no label-free training has produced.

        Args:
            network: The network in training.
            index: Index of each image of the batch, ``(B,)``.
            pending: Batches since the last write of the banks.

        Raises:
            RuntimeError: If the banks were not written after the step before, or an index
                is not that of a training image.
        """
        method, self._weights_used = network.method, None
        if index.device.type == "cpu":  # on a GPU the check would wait for the device
            outside = index[(index < 0) | (index >= method.num_images)]
            if len(outside):
                raise RuntimeError(
                    f"{outside[0].item()} is not the index of one of the "
                    f"{method.num_images} training images. {SUPERVISED}"
                )
        if self._expected is not None:
            if not self._expected:
                raise RuntimeError(_UNWRITTEN)
            self._expected -= 1
            return
        # A loop that does not open its steps may still use micro-batches.
        num_seen = len(index) + sum(len(batch.index) for batch in pending)
        weights = _some_weights(network)
        if not pending:
            self._weights_seen = weights
        elif num_seen > method.num_images or not torch.equal(weights, self._weights_seen):
            raise RuntimeError(_UNWRITTEN)


def _some_weights(network: Any) -> Tensor:
    """Return a few weights, which differ after a step of an optimizer."""
    parts = (network.heads, network.backbone)
    few = [weight for part in parts for weight in [*part.parameters()][:_FEW]]
    return torch.cat([weight.detach().flatten()[:1].float() for weight in few])


def check_paths(index: Tensor, paths: Sequence[str], own: Sequence[str] | None) -> None:
    """Refuse a batch whose labels are not the indices of its images.

    Args:
        index: Labels of the batch, ``(B,)``.
        paths: Path of each image.
        own: Path of each training image; None if unknown.

    Raises:
        RuntimeError: If a label is not the index of the image at its path, or images share
            a label.
    """
    of_label: dict[int, str] = {}
    for label, path in zip(index.tolist(), paths, strict=False):
        if of_label.setdefault(label, path) != path:
            raise RuntimeError(
                f"{path} and {of_label[label]} have the same label {label}, which is no "
                f"index of an image. {SUPERVISED}"
            )
        if own is not None and (not 0 <= label < len(own) or own[label] != path):
            raise RuntimeError(
                f"{path} has the label {label}, which is not its index among the "
                f"{len(own)} training images. {SUPERVISED}"
            )

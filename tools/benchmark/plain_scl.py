"""Direct implementation of Selective Contrastive Learning, the baseline of bench_step.py.

It is not optimized and not meant for training. Distances are computed part by part, every
image sorts the whole bank, the softmax is computed separately for each positive, and the
banks are in CPU memory and written image by image. Only the gradient is that of the
package: the banks are written after the backward pass, so that both sides of the benchmark
compute the same result (bench_step.py compares them first).

Shape shorthand: B batch, M bank rows, C and D feature sizes, S parts, K neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PlainSettings:
    """Constants of the method by the symbols of the paper, and its temperature."""

    num_neighbors: int = 7
    num_negatives: int = 500
    lambda_g: float = 0.5
    lambda_c: float = 0.05
    lambda_t: float = 0.5
    lambda_p: float = 0.5
    alpha: float = 1.75
    temperature: float = 0.1


class PlainSelectiveContrastive:
    """Training step without the backbone, in the four phases of the method.

    Args:
        global_bank: Shape ``(M, C)``, on the CPU.
        part_bank: Shape ``(M, S, D)``, on the CPU.
        mixture_bank: Shape ``(M, C)``, on the CPU.
        cameras: Camera of each bank row, shape ``(M,)``.
        settings: Constants of the method.
    """

    def __init__(
        self,
        global_bank: Tensor,
        part_bank: Tensor,
        mixture_bank: Tensor,
        cameras: Tensor,
        settings: PlainSettings,
    ) -> None:
        self.global_bank = global_bank
        self.part_banks = [part_bank[:, s].contiguous() for s in range(part_bank.shape[1])]
        self.mixture_bank = mixture_bank
        self.cameras = cameras
        self.settings = settings

    def distance(self, features: Tensor, parts: Tensor, cameras: Tensor) -> Tensor:
        """Compute squared distances: global term, mean of parts, same-camera term.

        Args:
            features: Shape ``(B, C)``.
            parts: Shape ``(B, S, D)``.
            cameras: Shape ``(B,)``.

        Returns:
            Shape ``(B, M)``.
        """
        weight = self.settings.lambda_g
        global_distance = _squared_distance(features, self.global_bank)
        part_distance = torch.zeros_like(global_distance)
        for part, bank in enumerate(self.part_banks):
            part_distance += _squared_distance(parts[:, part], bank)
        part_distance /= len(self.part_banks)
        same_camera = (cameras[:, None] == self.cameras[None, :]).float()
        return (
            weight * global_distance
            + (1 - weight) * part_distance
            + self.settings.lambda_c * same_camera
        )

    def select(self, distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Sort the whole bank for each image and take positives and negatives from the top.

        Args:
            distance: Shape ``(B, M)``.
            index: Shape ``(B,)``.

        Returns:
            Positives ``(B, 1 + K)``, the own row first, and negatives ``(B, N)``.
        """
        last_positive = self.settings.num_neighbors
        last_negative = last_positive + self.settings.num_negatives
        positives, negatives = [], []
        for row, own in zip(distance, index, strict=True):
            ranked = row.argsort()
            ranked = ranked[ranked != own]
            positives.append(torch.cat([own[None], ranked[:last_positive]]))
            negatives.append(ranked[last_positive:last_negative])
        return torch.stack(positives), torch.stack(negatives)

    def loss(
        self, features: Tensor, parts: Tensor, positives: Tensor, negatives: Tensor
    ) -> Tensor:
        """Sum the terms of the loss over images, views and positives.

        Args:
            features: Shape ``(B, C)``, with gradient.
            parts: Shape ``(B, S, D)``, with gradient.
            positives: Shape ``(B, 1 + K)``.
            negatives: Shape ``(B, N)``.

        Returns:
            Scalar loss.
        """
        total = features.new_zeros(())
        for i in range(len(features)):
            total = total + (1 - self.settings.lambda_p) * self._image_loss(
                features[i], positives[i], negatives[i]
            )
            total = total + self.settings.lambda_p * self._image_loss(
                parts[i].flatten(), positives[i], negatives[i]
            )
        return total / len(features)

    def _image_loss(self, vector: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        settings = self.settings
        loss = vector.new_zeros(())
        for rank, positive in enumerate(positives):
            others = torch.cat([positives[:rank], positives[rank + 1 :], negatives])
            candidates = torch.cat([positive[None], others])
            logits = self.mixture_bank[candidates] @ vector / settings.temperature
            probability = torch.softmax(logits, dim=0)[0]
            if rank == 0:
                weight = settings.lambda_t
            else:
                weight = settings.alpha * (1 - settings.lambda_t) / settings.num_neighbors
            loss = loss - weight * torch.log(probability)
        return loss

    @torch.no_grad()
    def update(
        self, index: Tensor, features: Tensor, parts: Tensor, positives: Tensor
    ) -> None:
        """Write the banks image by image.

        Args:
            index: Shape ``(B,)``.
            features: Shape ``(B, C)``.
            parts: Shape ``(B, S, D)``.
            positives: Shape ``(B, 1 + K)``.
        """
        for i, own in enumerate(index):
            _blend(self.global_bank, own, features[i])
            for part, bank in enumerate(self.part_banks):
                _blend(bank, own, parts[i, part])
        for view in (parts.flatten(1), features):
            for rank in reversed(range(positives.shape[1])):
                for i, vector in enumerate(view):
                    _blend(self.mixture_bank, positives[i, rank], vector)


def _squared_distance(features: Tensor, bank: Tensor) -> Tensor:
    # |a|^2 + |b|^2 - 2 a.b, for vectors of any length.
    lengths = features.pow(2).sum(dim=1)[:, None] + bank.pow(2).sum(dim=1)[None, :]
    return lengths - 2 * features @ bank.T


def _blend(bank: Tensor, row: Tensor, vector: Tensor) -> None:
    bank[row] = F.normalize((bank[row] + vector) / 2, dim=0)

"""Selective contrastive loss: several weighted positives, chosen negatives.

Shape shorthand in this module:

    B: images in the batch (anchors)
    V: views of an anchor that share its candidates (global vector, concatenated parts)
    C: feature dimension
    M: entries in the memory bank, one per training image
    P: positives per anchor; column 0 is the anchor's own entry
    N: negatives per anchor
    A: candidates per anchor, A = P + N
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selcon_plugin.distance import bank_product

# No gather beyond this many values (1 GiB in float32), however large the bank.
_MAX_GATHERED_VALUES = 2**28
# Up to this many gathered values (8 MiB) logits are float64: it costs nothing there, and
# the temperature magnifies float32 rounding to a gradient error of about 1e-6.
_MAX_DOUBLE_VALUES = 2**20


def _rows_per_candidate(batch_size: int) -> float:
    """Bank rows per candidate at which a gather and a full product cost the same."""
    # The gather moves about 3 * B * A * C values, the product about 2 * M * C: equal at
    # 1.5 * B rows per candidate, until the batch is so large that arithmetic bounds the
    # product. Measured with two CPU threads: 7 to 11 for B = 8, 31 to 42 for B = 64
    # (tools/benchmark/bench_step.py --crossover). No GPU has been measured.
    return min(1.5 * batch_size, 32.0)


def positive_weights(
    num_positives: int, *, self_weight: float = 0.5, neighbor_scale: float = 1.75
) -> Tensor:
    """Weights of the positives: the own entry first, the rest shared by the neighbours.

    Args:
        num_positives: Columns P = 1 + K.
        self_weight: Weight of the own entry (the paper's λ_t), in (0, 1].
        neighbor_scale: Factor α on what is left for the neighbours: each gets
            ``α (1 - λ_t) / K``. Above 1 the weights sum to more than 1, as in the paper.

    Returns:
        Float32 weights, shape ``(P,)``.

    Example:
        >>> positive_weights(8).tolist()
        [0.5, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125]
    """
    weights = torch.empty(num_positives)
    weights[0] = self_weight
    if num_positives > 1:
        weights[1:] = neighbor_scale * (1.0 - self_weight) / (num_positives - 1)
    return weights


def candidate_similarity(features: Tensor, bank: Tensor, candidates: Tensor) -> Tensor:
    """Inner products of each anchor's views with that anchor's candidates.

    Either the candidates' rows are gathered, ``(B, A, C)``, or the product with the whole
    bank is taken, ``(B, M)``, and the candidates are picked from it: whichever is cheaper.
    Both give the same values up to rounding.

    Args:
        features: Shape ``(B, V, C)``.
        bank: Shape ``(M, C)``, a constant; float32 or half precision.
        candidates: Bank rows, int64, shape ``(B, A)``.

    Returns:
        Shape ``(B, V, A)``; float64 for small problems on CPU and CUDA, else float32.
    """
    batch_size, num_views, dim = features.shape
    num_candidates = candidates.shape[1]
    bank = bank.detach()
    gathered_values = batch_size * num_candidates * dim
    is_small = gathered_values <= _MAX_DOUBLE_VALUES and features.device.type in (
        "cpu",
        "cuda",
    )
    if is_small or (
        num_candidates * _rows_per_candidate(batch_size) <= bank.shape[0]
        and gathered_values <= _MAX_GATHERED_VALUES
    ):
        dtype = torch.float64 if is_small else torch.float32
        with torch.autocast(device_type=features.device.type, enabled=False):
            rows = bank[candidates].to(dtype)  # (B, A, C)
            return features.to(dtype) @ rows.transpose(1, 2)
    dense = bank_product(features.flatten(0, 1), bank).view(batch_size, num_views, -1)
    return dense.gather(2, candidates[:, None].expand(-1, num_views, -1))


def selective_contrastive_loss(
    features: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    *,
    positive_weight: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    r"""Pull each anchor towards its positives and away from its negatives.

    For anchor :math:`f_i` with candidates :math:`A_i` (its positives followed by its
    negatives) the loss is a weighted cross-entropy against every positive,

    .. math::
        L_i = -\sum_{p=0}^{P-1} w_p \log
            \frac{\exp(f_i \cdot v_p / \tau)}{\sum_{a \in A_i} \exp(f_i \cdot v_a / \tau)}

    and the batch loss is the mean of :math:`L_i`. With ``P == 1`` and weight 1 this is
    InfoNCE. The bank is a constant here: it gets no gradient and is never written. Logits
    and softmax are at least float32, also under autocast.

    Args:
        features: Anchor features, shape ``(B, C)``; or ``(B, V, C)`` for several views of
            each anchor that share candidates, so that the bank is read once.
        bank: Memory-bank entries, shape ``(M, C)``.
        positive_index: Bank rows of the positives, int64, shape ``(B, P)``.
        negative_index: Bank rows of the negatives, int64, shape ``(B, N)``.
        positive_weight: Weight of each positive column, shape ``(P,)``.
        temperature: Softmax temperature τ; similarities are divided by it.

    Returns:
        Scalar loss, mean over the batch; for several views one mean per view, shape
        ``(V,)``.

    Raises:
        ValueError: If ``temperature`` is not positive, or if ``positive_weight`` does not
            have one entry per positive column.

    Example:
        >>> bank = torch.eye(2)
        >>> loss = selective_contrastive_loss(
        ...     features=bank[:1],
        ...     bank=bank,
        ...     positive_index=torch.tensor([[0]]),
        ...     negative_index=torch.tensor([[1]]),
        ...     positive_weight=torch.ones(1),
        ...     temperature=1.0,
        ... )
        >>> round(loss.item(), 4)  # log(1 + exp(-1))
        0.3133

    References:
        Pang et al., "Fully Unsupervised Person Re-identification via Selective
        Contrastive Learning", 2020. https://arxiv.org/abs/2010.07608
    """
    num_positives = positive_index.shape[1]
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if positive_weight.shape != (num_positives,):
        raise ValueError(
            f"positive_weight must have one entry for each of the {num_positives} positive "
            f"columns, got shape {tuple(positive_weight.shape)}"
        )
    views = features if features.dim() == 3 else features[:, None]
    candidates = torch.cat([positive_index, negative_index], dim=1)
    similarity = candidate_similarity(views, bank, candidates)  # (B, V, A)
    log_prob = F.log_softmax(similarity / temperature, dim=2)
    weight = positive_weight.to(log_prob)
    with torch.autocast(device_type=log_prob.device.type, enabled=False):
        loss = -(log_prob[:, :, :num_positives] @ weight).mean(dim=0)  # (V,)
    # float32, unless the features themselves are float64.
    loss = loss.to(torch.promote_types(features.dtype, torch.float32))
    return loss if features.dim() == 3 else loss[0]


class SelectiveContrastiveLoss(nn.Module):
    """:func:`selective_contrastive_loss` with the weights of the paper.

    The weights follow the positives actually given: a warm-up batch whose only positive is
    the image itself has the single weight ``self_weight``, and a bank too small for K
    neighbours shares the neighbours' weight among those it has.

    Args:
        num_neighbors: Neighbours K a full batch has.
        self_weight: Weight λ_t of the own entry.
        neighbor_scale: Factor α on the weight shared by the neighbours.
        temperature: Softmax temperature τ.

    Raises:
        ValueError: If ``num_neighbors`` is negative or ``temperature`` not positive.

    Example:
        >>> criterion = SelectiveContrastiveLoss(num_neighbors=1)
        >>> bank = torch.eye(3)
        >>> loss = criterion(bank[:1], bank, torch.tensor([[0, 1]]), torch.tensor([[2]]))
        >>> loss.shape
        torch.Size([])
    """

    weights: Tensor

    def __init__(
        self,
        num_neighbors: int,
        self_weight: float = 0.5,
        neighbor_scale: float = 1.75,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if num_neighbors < 0:
            raise ValueError(f"num_neighbors must be 0 or more, got {num_neighbors}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.num_neighbors = num_neighbors
        self.self_weight = self_weight
        self.neighbor_scale = neighbor_scale
        self.temperature = temperature
        # Kept on the device, so that a step copies nothing; not state, since it follows
        # from the settings.
        self.register_buffer("weights", self._weights(1 + num_neighbors), persistent=False)

    def _weights(self, num_positives: int) -> Tensor:
        return positive_weights(
            num_positives, self_weight=self.self_weight, neighbor_scale=self.neighbor_scale
        )

    def extra_repr(self) -> str:
        """Describe the settings in ``print(model)``."""
        return (
            f"num_neighbors={self.num_neighbors}, self_weight={self.self_weight}, "
            f"neighbor_scale={self.neighbor_scale}, temperature={self.temperature}"
        )

    def forward(
        self, features: Tensor, bank: Tensor, positive_index: Tensor, negative_index: Tensor
    ) -> Tensor:
        """Compute the loss; arguments and result as in the function.

        Args:
            features: Shape ``(B, C)`` or ``(B, V, C)``.
            bank: Shape ``(M, C)``.
            positive_index: Shape ``(B, P)``.
            negative_index: Shape ``(B, N)``.

        Returns:
            Scalar, or shape ``(V,)`` for several views.
        """
        num_positives = positive_index.shape[1]
        weights = self.weights
        if num_positives != len(weights):
            weights = self._weights(num_positives)
        return selective_contrastive_loss(
            features,
            bank,
            positive_index,
            negative_index,
            positive_weight=weights,
            temperature=self.temperature,
        )

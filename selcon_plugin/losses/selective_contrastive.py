"""Selective contrastive loss: several weighted positives and selected negatives.

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
from selcon_plugin.renamed import accept_old_arguments

# No more than this many values (1 GiB in float32) are gathered, however large the bank.
_MAX_GATHERED_VALUES = 2**28
# Up to this many gathered values (8 MiB) logits are float64: this costs nothing, and the
# temperature amplifies float32 rounding to a gradient error of about 1e-6.
_MAX_DOUBLE_VALUES = 2**20


def _rows_per_candidate(batch_size: int) -> float:
    """Return the bank rows per candidate at which gather and full product cost the same."""
    # The gather moves about 3 * B * A * C values and the product about 2 * M * C. They are
    # equal at 1.5 * B rows per candidate, until the batch is so large that arithmetic
    # limits the product. Measurements with two CPU threads: 7 to 11 for B = 8, 31 to 42 for
    # B = 64 (tools/benchmark/bench_step.py --crossover). No GPU has been measured.
    return min(1.5 * batch_size, 32.0)


def positive_weights(
    num_positives: int, *, self_weight: float = 0.5, neighbor_scale: float = 1.75
) -> Tensor:
    """Return the weights of the positives: the own entry first, then the neighbors.

    Args:
        num_positives: Columns P = 1 + K.
        self_weight: Weight of the own entry (the paper's λ_t), in (0, 1].
        neighbor_scale: Factor α on the remaining weight of the neighbors: each has
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
    """Compute the inner products of each anchor's views with that anchor's candidates.

    Either the candidates' rows are gathered, ``(B, A, C)``, or the product with the whole
    bank is computed, ``(B, M)``, and the candidates are read from it, whichever is cheaper.
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


def _present_candidates(
    positive_index: Tensor,
    negative_index: Tensor,
    positive_weight: Tensor,
    negative_mask: Tensor | None,
) -> Tensor | None:
    """Check weights and mask; return which candidates exist, ``(B, A)``, None for all."""
    if positive_weight.shape not in (positive_index.shape[1:], positive_index.shape):
        raise ValueError(
            f"positive_weight must have shape ({positive_index.shape[1]},), one entry per "
            f"positive column, or {tuple(positive_index.shape)}, one per positive, got "
            f"shape {tuple(positive_weight.shape)}"
        )
    if negative_mask is not None and (
        negative_mask.shape != negative_index.shape or negative_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"negative_mask must be bool of shape {tuple(negative_index.shape)}, got "
            f"{negative_mask.dtype} of shape {tuple(negative_mask.shape)}"
        )
    if positive_weight.dim() == 1 and negative_mask is None:
        return None
    positive_mask = torch.ones_like(positive_index, dtype=torch.bool)
    if positive_weight.dim() == 2:
        positive_mask = positive_weight != 0
    if negative_mask is None:
        negative_mask = torch.ones_like(negative_index, dtype=torch.bool)
    return torch.cat([positive_mask, negative_mask], dim=1)


@accept_old_arguments
def selective_contrastive_loss(
    features: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    *,
    positive_weight: Tensor,
    negative_mask: Tensor | None = None,
    ignored_positive: Tensor | None = None,
    ignored_negative: Tensor | None = None,
    temperature: float = 0.1,
    focal_gamma: float = 0.0,
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

    Anchors may have different numbers of candidates. If every anchor has its own weights, a
    positive of weight 0 is absent; with ``negative_mask``, a negative whose entry is False
    is absent. Absent candidates are not in :math:`A_i`, and their index may be any row. An
    anchor without positives has loss 0, and counts in the mean.

    Pairs can be ignored: a negative in ``ignored_negative`` does not count against a
    positive in ``ignored_positive``, that is, :math:`A_i` does not contain it for that
    positive.

    With ``focal_gamma`` :math:`\gamma` each :math:`L_i` is multiplied by :math:`(1 -
    P_i)^\gamma`, where :math:`P_i` is the softmax probability of all positives together:
    anchors that already match them count less. The factor has a gradient as well.

    Args:
        features: Anchor features, shape ``(B, C)``; or ``(B, V, C)`` for several views of
            each anchor that have the same candidates, so that the bank is read once.
        bank: Memory-bank entries, shape ``(M, C)``.
        positive_index: Bank rows of the positives, int64, shape ``(B, P)``.
        negative_index: Bank rows of the negatives, int64, shape ``(B, N)``.
        positive_weight: Weight of each positive column, shape ``(P,)``; or of each anchor's
            positives, shape ``(B, P)``, with 0 for absent ones.
        negative_mask: False for absent negatives, bool, shape ``(B, N)``; None if none is
            absent.
        ignored_positive: Positives against which the ignored negatives do not count, bool,
            shape ``(B, P)``; None for none.
        ignored_negative: The ignored negatives, bool, shape ``(B, N)``; required with
            ``ignored_positive``.
        temperature: Softmax temperature τ; similarities are divided by it.
        focal_gamma: Exponent γ of the focal factor, at least 0 (off).

    Returns:
        Scalar loss, mean over the batch; for several views one mean per view, shape
        ``(V,)``.

    Raises:
        ValueError: If ``temperature`` is not positive, ``focal_gamma`` is negative,
            ``positive_weight`` or ``negative_mask`` does not fit the indices, or one of
            the two ``ignored`` masks is missing.

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
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not focal_gamma >= 0:
        raise ValueError(f"focal_gamma must be 0 or more, got {focal_gamma}")
    if (ignored_positive is None) != (ignored_negative is None):
        raise ValueError("ignored_positive and ignored_negative must be given together")
    present = _present_candidates(
        positive_index, negative_index, positive_weight, negative_mask
    )
    views = features if features.dim() == 3 else features[:, None]
    candidates = torch.cat([positive_index, negative_index], dim=1)
    logits = candidate_similarity(views, bank, candidates) / temperature  # (B, V, A)
    if present is not None:
        # Not -inf: its product with weight 0 would be NaN.
        logits = logits.masked_fill(~present[:, None], torch.finfo(logits.dtype).min)
    num_positives = positive_index.shape[1]
    all_log_prob = F.log_softmax(logits, dim=2)[:, :, :num_positives]  # (B, V, P)
    log_prob = all_log_prob
    if ignored_positive is not None and ignored_negative is not None:
        ignored = F.pad(ignored_negative, (num_positives, 0))[:, None]  # (B, 1, A)
        fewer = logits.masked_fill(ignored, torch.finfo(logits.dtype).min)
        log_prob = torch.where(
            ignored_positive[:, None],
            F.log_softmax(fewer, dim=2)[:, :, :num_positives],
            all_log_prob,
        )
    weight = positive_weight.to(log_prob)
    with torch.autocast(device_type=log_prob.device.type, enabled=False):
        if weight.dim() == 1:
            losses = -(log_prob @ weight)  # (B, V)
        else:
            losses = -(log_prob @ weight[:, :, None]).squeeze(2)
        if focal_gamma:
            losses = losses * _focal_factor(all_log_prob, focal_gamma)
        loss = losses.mean(dim=0)  # (V,)
    # float32, unless the features themselves are float64.
    loss = loss.to(torch.promote_types(features.dtype, torch.float32))
    return loss if features.dim() == 3 else loss[0]


def _focal_factor(log_prob: Tensor, gamma: float) -> Tensor:
    """Return (1 - P)^γ, P the positives' probability; ``(B, V, P)`` to ``(B, V)``."""
    share = log_prob.logsumexp(dim=2).clamp(max=0.0)  # rounding may pass log 1
    # At P = 1 an exponent below 1 has an infinite gradient.
    others = (-torch.expm1(share)).clamp(min=torch.finfo(share.dtype).tiny)
    return others**gamma


class SelectiveContrastiveLoss(nn.Module):
    """:func:`selective_contrastive_loss` with the weights of the paper.

    The weights depend on the positives that are given: in a warm-up batch, whose only
    positive is the image itself, the single weight is ``self_weight``, and in a bank too
    small for K neighbors the existing ones share the neighbors' weight.

    Args:
        num_neighbors: Neighbors K in a full batch.
        self_weight: Weight λ_t of the own entry.
        neighbor_scale: Factor α on the weight shared by the neighbors.
        temperature: Softmax temperature τ.
        focal_gamma: Exponent γ of the focal factor, at least 0 (off).

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
        focal_gamma: float = 0.0,
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
        self.focal_gamma = focal_gamma
        # The weights stay on the device, so that a step copies nothing. They follow from
        # the settings, and so are not part of the state.
        self.register_buffer("weights", self._weights(1 + num_neighbors), persistent=False)

    def _weights(self, num_positives: int) -> Tensor:
        return positive_weights(
            num_positives, self_weight=self.self_weight, neighbor_scale=self.neighbor_scale
        )

    def extra_repr(self) -> str:
        """Describe the settings in ``print(model)``."""
        return (
            f"num_neighbors={self.num_neighbors}, self_weight={self.self_weight}, "
            f"neighbor_scale={self.neighbor_scale}, temperature={self.temperature}, "
            f"focal_gamma={self.focal_gamma}"
        )

    @accept_old_arguments
    def forward(
        self,
        features: Tensor,
        bank: Tensor,
        positive_index: Tensor,
        negative_index: Tensor,
        *,
        positive_mask: Tensor | None = None,
        negative_mask: Tensor | None = None,
        ignored_positive: Tensor | None = None,
        ignored_negative: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss; arguments and result as in the function.

        Args:
            features: Shape ``(B, C)`` or ``(B, V, C)``.
            bank: Shape ``(M, C)``.
            positive_index: Shape ``(B, P)``.
            negative_index: Shape ``(B, N)``.
            positive_mask: False for absent positives, bool ``(B, P)``; None if none is
                absent. The present neighbors share the neighbors' weight.
            negative_mask: False for absent negatives, bool ``(B, N)``; None if none is
                absent.
            ignored_positive: Positives against which ignored negatives do not count, bool
                ``(B, P)``; None for none.
            ignored_negative: The ignored negatives, bool ``(B, N)``; required with
                ``ignored_positive``.
            sample_weight: Factor on each anchor's loss, shape ``(B,)``; None for 1.

        Returns:
            Scalar, or shape ``(V,)`` for several views.
        """
        num_positives = positive_index.shape[1]
        weights = self.weights
        if num_positives != len(weights):
            weights = self._weights(num_positives).to(weights)
        if positive_mask is not None:
            present = positive_mask[:, 1:].sum(dim=1, keepdim=True).clamp(min=1)
            shared = weights[1:] * ((num_positives - 1) / present)
            own = weights[:1].expand(len(positive_mask), 1)
            weights = torch.cat([own, shared], dim=1) * positive_mask
        if sample_weight is not None:
            weights = weights * sample_weight.to(weights)[:, None]
        return selective_contrastive_loss(
            features,
            bank,
            positive_index,
            negative_index,
            positive_weight=weights,
            negative_mask=negative_mask,
            ignored_positive=ignored_positive,
            ignored_negative=ignored_negative,
            temperature=self.temperature,
            focal_gamma=self.focal_gamma,
        )

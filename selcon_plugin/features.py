"""Embedding heads: from a feature map to a global vector and S horizontal part vectors.

Shape shorthand in this module:

    B: images in the batch
    F: channels of the backbone's feature map; h, w: its height and width
    C: global feature dimension
    S: horizontal parts (stripes, top to bottom); D: part feature dimension
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

# Half precision changes the length of a unit vector by some 1e-3.
_LENGTH_TOLERANCE = 1e-2
# Squared distances between longer vectors may be infinite in single precision.
_MAX_LENGTH = 1e18

_DEFAULT_PARTS = 8


class BadFeaturesError(ValueError):
    """Error for features that cannot be compared; the message names the first bad row."""


def check_features(
    features: Any,
    *,
    source: str,
    rows: int | None = None,
    dim: int | None = None,
    unit: bool = True,
) -> NDArray[np.float32]:
    """Refuse features that would give wrong similarities.

    Every place that takes features from outside calls this function: networks, files,
    callers and evaluators.

    Args:
        features: Array, tensor or nested list of floating-point numbers ``(N, D)``.
        source: Start of the message, such as the file that contains the features.
        rows: Required number N; None for any.
        dim: Required dimension D; None for any above 0.
        unit: Whether every row must have length 1, up to the rounding of half precision.

    Returns:
        The features in float32, shape ``(N, D)``.

    Raises:
        BadFeaturesError: If the type, the shape or a value is wrong.
    """
    array = _as_array(features, source)
    wanted = f"({'N' if rows is None else rows}, {'D' if dim is None else dim})"
    fits = array.ndim == 2 and array.shape[1] > 0
    fits = fits and rows in (None, len(array)) and dim in (None, array.shape[1])
    if not fits:
        raise BadFeaturesError(
            f"{source}: features must have shape {wanted}, got {array.shape}. Compute them "
            "again with the network that belongs to them"
        )
    if array.dtype.kind != "f":
        raise BadFeaturesError(
            f"{source}: features must be floating-point numbers, got {array.dtype}"
        )
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    # One pass over the values: a sum of squares is finite only if all values are.
    lengths = np.sqrt(np.square(array, dtype=np.float64).sum(axis=1))
    _check_lengths(lengths, source, unit=unit)
    return array


def _as_array(features: Any, source: str) -> NDArray[Any]:
    if isinstance(features, Tensor):
        features = features.detach().cpu()
        if features.dtype == torch.bfloat16:  # unknown to NumPy
            features = features.float()
    try:
        return np.asarray(features)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadFeaturesError(
            f"{source}: features must be an array of shape (N, D): {error}"
        ) from error


def _check_lengths(lengths: NDArray[np.float64], source: str, *, unit: bool) -> None:
    bad = np.flatnonzero(~(lengths < _MAX_LENGTH))
    if len(bad):
        raise BadFeaturesError(
            f"{source}: {len(bad)} of {len(lengths)} features are not finite, the first in "
            f"row {bad[0]}. Check the weights and the precision of the network"
        )
    if not unit:
        return
    bad = np.flatnonzero(np.abs(lengths - 1.0) > _LENGTH_TOLERANCE)
    if len(bad):
        raise BadFeaturesError(
            f"{source}: {len(bad)} of {len(lengths)} features are not vectors of unit "
            f"length, the first in row {bad[0]} with length {lengths[bad[0]]:.4g}. Divide "
            "each row by its length; a row of zeros cannot be compared"
        )


class Embeddings(NamedTuple):
    """L2-normalized embeddings of a batch of images.

    Attributes:
        global_features: One vector per image, shape ``(B, C)``.
        part_features: One vector per image and part, shape ``(B, S, D)``; None if the head
            has no parts.
    """

    global_features: Tensor
    part_features: Tensor | None = None

    def detach(self) -> Embeddings:
        """Return the embeddings detached from the autograd graph."""
        parts = self.part_features
        return Embeddings(
            self.global_features.detach(), None if parts is None else parts.detach()
        )

    @classmethod
    def cat(cls, batches: Sequence[Embeddings]) -> Embeddings:
        """Concatenate batches along the first axis.

        Args:
            batches: At least one batch; all with parts, or all without.

        Returns:
            One batch with all images.
        """
        parts = [batch.part_features for batch in batches]
        present = [part for part in parts if part is not None]
        return cls(
            torch.cat([batch.global_features for batch in batches]),
            torch.cat(present) if present else None,
        )


def check_parts_fit(num_rows: int, num_parts: int) -> None:
    """Check that a feature map has at least as many rows as parts.

    Args:
        num_rows: Height h of the map.
        num_parts: Number of parts S.

    Raises:
        ValueError: If h < S; the message gives the remedy.
    """
    if num_rows < num_parts:
        raise ValueError(
            f"cannot split a feature map of {num_rows} rows into {num_parts} horizontal "
            f"parts: use at most {num_rows} parts (NUM_PARTS), a smaller stride of the "
            "last stage (LAST_STRIDE 1) or a larger input"
        )


def most_parts(num_rows: int, embedding_dim: int) -> int:
    """Return the largest number of parts, up to 8, that map and embedding allow.

    Args:
        num_rows: Rows of the feature map; 1 where a backbone returns one vector.
        embedding_dim: Dimension of the global feature, a multiple of the number of parts.
    """
    if num_rows == 1:
        return 0
    fitting = range(1, min(num_rows, _DEFAULT_PARTS) + 1)
    return max(parts for parts in fitting if embedding_dim % parts == 0)


def split_stripes(feature_map: Tensor, num_parts: int) -> list[Tensor]:
    """Split a feature map into horizontal stripes of (nearly) equal height.

    Stripe s holds the rows ``floor(s*h/S)`` to ``ceil((s+1)*h/S)``. If S divides h, these
    are the disjoint stripes of the paper; otherwise adjacent stripes share a row, while the
    released code would omit the last rows (the feet).

    Args:
        feature_map: Shape ``(B, F, h, w)``.
        num_parts: Number of stripes S, at least 1.

    Returns:
        S views of the map, top to bottom, each ``(B, F, rows, w)``.
    """
    height = feature_map.shape[2]
    check_parts_fit(height, num_parts)
    return [
        feature_map[
            :, :, part * height // num_parts : math.ceil((part + 1) * height / num_parts)
        ]
        for part in range(num_parts)
    ]


class GeneralizedMeanPool(nn.Module):
    r"""Generalized-mean pooling :math:`(\operatorname{mean} x^p)^{1/p}` with learnable p.

    p = 1 is average pooling; larger p is closer to max pooling. Radenović et al.,
    "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018.
    https://arxiv.org/abs/1711.02512

    Args:
        exponent: Initial value of p.
        floor: Lower bound to which inputs are clamped, since powers need positive values.
    """

    def __init__(self, exponent: float = 3.0, floor: float = 1e-6) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor([exponent]))
        self.floor = floor

    def forward(self, feature_map: Tensor) -> Tensor:
        """Pool ``(B, F, h, w)`` to ``(B, F, 1, 1)``."""
        powers = feature_map.clamp(min=self.floor).pow(self.exponent)
        return F.adaptive_avg_pool2d(powers, 1).pow(1.0 / self.exponent)


class GlobalPartEmbedding(nn.Module):
    """Head that turns a feature map into L2-normalized global and part features.

    Global: pool → linear F→C → norm → L2. Part s: pool stripe s → separate linear F→D →
    norm → L2, with D = C / S, so the concatenated parts have the dimension of the global
    vector: both are compared with the same mixture bank.

    Args:
        feature_dim: Channels F of the feature map.
        embedding_dim: Global feature dimension C.
        num_parts: Number of horizontal parts S; 0 disables the part branch.
        project_global: Whether the global branch has a linear layer; without it C must
            equal F.
        pool: Factory of a pooling layer ``(B, F, h, w)`` → ``(B, F, 1, 1)``; called once,
            since the global vector and the stripes share the layer. Average pooling by
            default.
        norm: Factory of a normalization layer for ``(B, channels, 1, 1)``. BatchNorm with
            learnable scale and shift by default.

    Raises:
        ValueError: If S does not divide C, or C ≠ F without projection.
    """

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int,
        num_parts: int = 8,
        *,
        project_global: bool = True,
        pool: Callable[[], nn.Module] | None = None,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if num_parts < 0:
            raise ValueError(f"num_parts must be 0 or more, got {num_parts}")
        if num_parts and embedding_dim % num_parts:
            raise ValueError(
                f"the embedding dimension ({embedding_dim}) must be a multiple of the "
                f"number of parts ({num_parts}), because the concatenated parts share the "
                "mixture bank with the global vector; change EMBEDDING_DIM or NUM_PARTS"
            )
        if not project_global and embedding_dim != feature_dim:
            raise ValueError(
                f"without a projection the embedding dimension ({embedding_dim}) must "
                f"equal the backbone's feature dimension ({feature_dim})"
            )
        make_norm = norm or nn.BatchNorm2d
        self.global_dim = embedding_dim
        self.num_parts = num_parts
        self.part_dim = embedding_dim // num_parts if num_parts else 0
        self.pool = pool() if pool is not None else nn.AdaptiveAvgPool2d(1)
        self.global_projection: nn.Module = (
            nn.Linear(feature_dim, embedding_dim) if project_global else nn.Identity()
        )
        self.global_norm = make_norm(embedding_dim)
        if num_parts:
            # One separate F -> D layer per part, stored in one tensor so that all parts
            # need only one batched product.
            self.part_weight = nn.Parameter(
                torch.empty(num_parts, self.part_dim, feature_dim)
            )
            self.part_bias = nn.Parameter(torch.zeros(num_parts, self.part_dim))
            self.part_norm = make_norm(num_parts * self.part_dim)
        self.reset_parameters()

    def drop_parts(self) -> None:
        """Remove the part branch, for a method that does not use it."""
        if self.num_parts:
            self.num_parts = self.part_dim = 0
            del self.part_weight, self.part_bias, self.part_norm

    def reset_parameters(self) -> None:
        """Reinitialize the linear layers: Kaiming-normal in fan-out mode, zero bias."""
        if isinstance(self.global_projection, nn.Linear):
            nn.init.kaiming_normal_(self.global_projection.weight, mode="fan_out")
            nn.init.zeros_(self.global_projection.bias)
        if self.num_parts:
            for weight in self.part_weight.unbind(0):
                nn.init.kaiming_normal_(weight, mode="fan_out")
            nn.init.zeros_(self.part_bias)

    def forward(self, feature_map: Tensor) -> Embeddings:
        """Embed a batch of feature maps.

        Args:
            feature_map: Shape ``(B, F, h, w)`` with h at least S.

        Returns:
            Unit vectors in float32: global ``(B, C)`` and parts ``(B, S, D)`` or None.
        """
        pooled = self.pool(feature_map).flatten(1)  # (B, F)
        global_features = self._normalize(self.global_norm, self.global_projection(pooled))
        if not self.num_parts:
            return Embeddings(global_features)
        stripes = split_stripes(feature_map, self.num_parts)
        pooled_parts = torch.stack([self.pool(s).flatten(1) for s in stripes], dim=1)
        # (B, S, F) x (S, D, F) -> (B, S, D)
        parts = (
            torch.einsum("bsf,sdf->bsd", pooled_parts, self.part_weight) + self.part_bias
        )
        flat = self.part_norm(parts.flatten(1)[..., None, None]).flatten(1)
        part_features = F.normalize(flat.float().unflatten(1, (self.num_parts, -1)), dim=2)
        return Embeddings(global_features, part_features)

    @staticmethod
    def _normalize(norm: nn.Module, vectors: Tensor) -> Tensor:
        # The normalization runs in float32: under autocast a half-precision norm has an
        # error of 1e-3, which the temperature would amplify.
        normed: Tensor = norm(vectors[..., None, None]).flatten(1)
        return F.normalize(normed.float(), dim=1)


def fused_feature(embeddings: Embeddings, *, global_distance_weight: float = 0.5) -> Tensor:
    r"""Concatenate global and part features so that cosine ranks like the fused distance.

    With weights :math:`\sqrt{w}` on the global vector and :math:`\sqrt{(1-w)/S}` on each
    part, the result has unit length and ``2 - 2 * cosine`` equals the distance of
    :func:`selcon_plugin.distance.fused_distance` without its camera term. A host's
    evaluator therefore ranks by the training distance without any change.

    Args:
        embeddings: Global ``(B, C)`` and parts ``(B, S, D)`` or None.
        global_distance_weight: Weight w of the global distance, in [0, 1].

    Returns:
        Unit vectors, shape ``(B, C + S*D)``; ``(B, C)`` without parts.
    """
    global_features, part_features = embeddings
    if part_features is None:
        return global_features
    part_weight = (1.0 - global_distance_weight) / part_features.shape[1]
    return torch.cat(
        [
            math.sqrt(global_distance_weight) * global_features,
            math.sqrt(part_weight) * part_features.flatten(1),
        ],
        dim=1,
    )

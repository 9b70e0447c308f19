"""Label-free detection of representation collapse.

A network has collapsed if it maps all images to nearly the same vector, or to few
directions: the loss may still decrease, while the ranking becomes random. The metrics below
need no identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.clustering import PseudoLabels

# Images sampled for nearest neighbors and spectrum: enough for two significant digits.
_SAMPLE = 1024
_ROWS_AT_ONCE = 4096

# Values beyond these limits cause a warning. In healthy runs on SyntheticPersons (1,000
# images) the variance was 0.89 or more and the effective rank 92 or more (9 networks of 5
# methods), and the largest cluster held 21 % of the images or less (209 clusterings in 52
# runs). The limit of the rank is low because some folders show only a few persons.
MIN_VARIANCE = 0.05
MIN_EFFECTIVE_RANK = 4.0
MAX_CLUSTER_RATIO = 0.5
# Smaller sets have a low rank and large clusters even without a collapse.
_MIN_IMAGES = 32


@torch.no_grad()
def measure_spread(features: Tensor) -> dict[str, float]:
    """Measure the spread of the features of all images.

    Neighbors and spectrum are computed for up to 1024 images, evenly spaced over the list;
    the neighbors are searched among all images.

    Args:
        features: Features of images 0..M-1, shape ``(M, C)``, M at least 2; L2-normalized
            here.

    Returns:
        ``embedding_variance``: mean squared distance from the mean feature,
        ``1 - |mean|²``; 0 if all features are equal and 1 if their mean is zero.
        ``effective_rank``:
        exponential of the entropy of the covariance's eigenvalues, 1 if all features vary
        along one direction and at most C (Roy and Vetterli, "The effective rank", 2007; as
        a sign of collapse: Garrido et al., "RankMe", 2023,
        https://arxiv.org/abs/2210.02885). ``nearest_similarity``: mean cosine similarity of
        an image and its nearest neighbor.

    Raises:
        ValueError: If there are fewer than 2 images.

    Example:
        >>> corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> {name: round(value, 3) for name, value in measure_spread(corners).items()}
        {'embedding_variance': 1.0, 'effective_rank': 2.0, 'nearest_similarity': 0.0}
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(
            "features must have shape (M, C) with 2 images or more, got shape "
            f"{tuple(features.shape)}"
        )
    unit = F.normalize(features.float(), dim=1)
    count = min(_SAMPLE, len(unit))
    sample = torch.arange(count, device=unit.device) * len(unit) // count
    values = torch.stack(
        [
            (1.0 - unit.mean(dim=0).square().sum()).clamp(min=0.0),
            _effective_rank(unit[sample]),
            _nearest_similarity(unit, sample),
        ]
    )
    names = ("embedding_variance", "effective_rank", "nearest_similarity")
    return dict(zip(names, values.tolist(), strict=True))


def _effective_rank(unit: Tensor) -> Tensor:
    centered = unit - unit.mean(dim=0)
    # Both products have the same non-zero eigenvalues: use the smaller one.
    tall = centered.shape[0] > centered.shape[1]
    product = centered.T @ centered if tall else centered @ centered.T
    if product.device.type == "mps":  # which has no float64
        product = product.cpu()
    values = torch.linalg.eigvalsh(product.double()).clamp(min=0.0)
    weights = values / values.sum().clamp(min=1e-30)
    entropy: Tensor = torch.special.entr(weights).sum()
    return entropy.exp().float().to(unit.device)


def _nearest_similarity(unit: Tensor, sample: Tensor) -> Tensor:
    anchors = unit[sample]
    nearest = anchors.new_full((len(anchors),), -torch.inf)
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        block = unit[start : start + _ROWS_AT_ONCE]
        similarity = anchors @ block.T
        itself = sample[:, None] == torch.arange(start, start + len(block)).to(sample)
        similarity.masked_fill_(itself, -torch.inf)
        nearest = torch.maximum(nearest, similarity.max(dim=1).values)
    return nearest.mean()


def measure_clusters(found: PseudoLabels) -> dict[str, float]:
    """Measure the relative size of the largest cluster.

    Args:
        found: Clusters of all images.

    Returns:
        ``largest_cluster_ratio``: fraction of all images, including outliers, in the
        largest cluster. For instance-level labels it refers to the clusters that the
        labeler found before the fallback.
    """
    if found.instance_level:
        largest = found.measured.get("max_cluster_size", 0.0)
    else:
        largest = int(found.sizes.max()) if found.num_clusters else 0
    return {"largest_cluster_ratio": largest / found.num_images}


@dataclass(frozen=True)
class CollapseSigns:
    """Descriptions of the signs of a collapse.

    Attributes:
        features: Signs in the features: too similar, or in too few directions.
        clusters: Signs in the clusters: too many images in one.
    """

    features: list[str]
    clusters: list[str]

    def __bool__(self) -> bool:
        return bool(self.features or self.clusters)

    def __str__(self) -> str:
        return "; ".join(self.features + self.clusters)


def find_collapse_signs(measured: Mapping[str, float], num_images: int) -> CollapseSigns:
    """Compare measured values with the limits of healthy runs.

    Args:
        measured: Results of :func:`measure_spread`, :func:`measure_clusters`, or both.
        num_images: Number of images M.

    Returns:
        The signs of a collapse; none for a healthy representation, or for too few images.

    Example:
        >>> print(find_collapse_signs({"largest_cluster_ratio": 0.9}, num_images=100))
        one cluster holds 90 % of the images
    """
    features: list[str] = []
    clusters: list[str] = []
    variance = measured.get("embedding_variance", 1.0)
    if variance < MIN_VARIANCE:
        features.append(
            f"all images have nearly the same feature (variance {variance:.2g}, below "
            f"{MIN_VARIANCE:g})"
        )
    rank = measured.get("effective_rank", MIN_EFFECTIVE_RANK)
    if rank < MIN_EFFECTIVE_RANK:
        features.append(
            f"the features vary in few directions (effective rank {rank:.1f}, below "
            f"{MIN_EFFECTIVE_RANK:g})"
        )
    ratio = measured.get("largest_cluster_ratio", 0.0)
    if ratio > MAX_CLUSTER_RATIO:
        clusters.append(f"one cluster holds {100 * ratio:.0f} % of the images")
    if num_images < _MIN_IMAGES:
        return CollapseSigns([], [])
    return CollapseSigns(features, clusters)

"""Compact record of the features and clusters in a run's folder, for its report.

The features of all images would take too much disk space. The record is computed from all
of them, but small: a label and a silhouette per image, principal components of at most
2,000 images for a map, histograms of distances, and the nearest neighbors of a few images.
A report can be rebuilt from it without weights, images in memory or a GPU.
"""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.clustering.quality import silhouette_samples
from selcon_plugin.io.atomic import replacing
from selcon_plugin.io.integrity import verify_zip

EMBEDDING_RECORD = "embedding.npz"
# Rows of ``EmbeddingRecord.counts``.
SAME_CAMERA, OTHER_CAMERA, UNKNOWN_CAMERA, SAME_CLUSTER = range(4)

_SAMPLE = 2000
_COMPONENTS = 50
_BINS = 50
_ANCHORS, _NEIGHBORS = 12, 10
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class EmbeddingRecord:
    """Features and clusters of the M training images in the form that a report needs.

    Attributes:
        epoch: Number of epochs trained when the features were computed.
        clustered: Whether the images were clustered, with at least one cluster.
        labels: Cluster of each image, -1 for an outlier, int32 ``(M,)``.
        silhouette: Silhouette of each image, -1 to 1, float16 ``(M,)``; NaN if undefined.
        sample: Images on the map, int32 ``(K,)``.
        points: Leading principal components of the sample, float16 ``(K, P)``.
        distance: Kind of distance in the histograms, ``"Jaccard"`` or ``"cosine"``.
        reach: Largest computed distance.
        eps: DBSCAN's eps; NaN without DBSCAN.
        edges: Bin edges of the histograms, ``(N + 1,)``.
        counts: Histograms of pairs by distance, int64 ``(4, N)``: from the same camera,
            from different cameras, of unknown cameras, and in the same cluster. One image
            of each pair is in the sample.
        anchors: Images with listed neighbors, int32 ``(A,)``.
        neighbors: Nearest other images of the anchors by cosine, int32 ``(A, L)``, nearest
            first.
        similarity: Cosine similarities of the neighbors, float16 ``(A, L)``.
    """

    epoch: int
    clustered: bool
    labels: NDArray[np.int32]
    silhouette: NDArray[np.float16]
    sample: NDArray[np.int32]
    points: NDArray[np.float16]
    distance: str
    reach: float
    eps: float
    edges: NDArray[np.float32]
    counts: NDArray[np.int64]
    anchors: NDArray[np.int32]
    neighbors: NDArray[np.int32]
    similarity: NDArray[np.float16]

    def __post_init__(self) -> None:
        num_images = len(self.labels)
        for name in ("sample", "anchors", "neighbors"):
            index = getattr(self, name)
            if index.size and not 0 <= index.min() <= index.max() < num_images:
                raise ValueError(f"{name} holds images outside of 0..{num_images - 1}")
        same_length = (
            (self.silhouette, self.labels),
            (self.points, self.sample),
            (self.neighbors, self.anchors),
            (self.similarity, self.anchors),
        )
        if any(len(first) != len(second) for first, second in same_length):
            raise ValueError("arrays of the record differ in length")
        if self.counts.shape != (4, len(self.edges) - 1):
            raise ValueError(f"counts have shape {self.counts.shape}")

    @property
    def num_clusters(self) -> int:
        """Number of clusters; outliers are not counted."""
        return int(self.labels.max(initial=-1)) + 1

    def save(self, folder: str | Path) -> Path:
        """Write the record into a run's folder.

        Args:
            folder: Existing folder of the run.

        Returns:
            The written file.
        """
        file = Path(folder, EMBEDDING_RECORD)
        with replacing(file) as stream:
            # The type stubs take the first keyword for a flag.
            np.savez_compressed(stream, **dataclasses.asdict(self))
        return file

    @classmethod
    def load(cls, folder: str | Path) -> EmbeddingRecord:
        """Read the record from a run's folder.

        Args:
            folder: Folder of the run.

        Returns:
            The record.

        Raises:
            FileNotFoundError: If there is no record.
            ValueError: If the record is broken.
        """
        file = Path(folder, EMBEDDING_RECORD)
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}")
        try:
            verify_zip(file, remedy="The next clustering of the run writes it again")
            # NumPy does not close a file that it opened if the archive is broken.
            with (
                file.open("rb") as stream,
                np.load(stream, allow_pickle=False) as arrays,
            ):
                values = {f.name: arrays[f.name] for f in dataclasses.fields(cls)}
            scalars = {name: a.item() for name, a in values.items() if a.ndim == 0}
            return cls(**{**values, **scalars})
        except (
            *(ValueError, KeyError, TypeError, AttributeError, IndexError),
            *(OSError, EOFError, zipfile.BadZipFile),
        ) as error:
            raise ValueError(f"{file} is broken: {error}") from error


@torch.no_grad()
def record_embedding(
    features: Tensor, camids: Tensor, found: PseudoLabels | None, *, epoch: int
) -> EmbeddingRecord:
    """Compute the record of features and clusters.

    Args:
        features: Features of the M images, ``(M, C)``, on any device; a row of zeros for
            an unreadable image.
        camids: Camera of each image, int64 ``(M,)``, -1 where unknown.
        found: Clusters of the images; None for a method without clusters.
        epoch: Number of epochs trained so far.

    Returns:
        The record.
    """
    unit = F.normalize(features.float(), dim=1)
    readable = unit.any(dim=1).nonzero().flatten().cpu()
    sample = _spread(readable, _SAMPLE)
    clustered = found is not None and not found.instance_level and found.num_clusters > 0
    labels = torch.full((len(unit),), -1)
    if found is not None and clustered:
        labels = found.labels
    cameras = camids.cpu()
    graph = None if found is None else found.distance
    if graph is None:
        kind, reach, edges = "cosine", 2.0, np.linspace(0, 2, _BINS + 1)
        counts = _count_cosines(unit, sample, labels, cameras, edges)
    else:
        kind, edges = "Jaccard", np.linspace(0, 1, _BINS + 1)
        reach = float(graph.data.max(initial=0.0))
        counts = _count_stored(graph[sample.numpy()], sample, labels, cameras, edges)
    anchors = _spread(readable, _ANCHORS)
    similarity, neighbors = _nearest(unit, anchors)
    eps = np.nan if found is None else found.measured.get("eps", np.nan)
    return EmbeddingRecord(
        epoch=epoch,
        clustered=clustered,
        labels=labels.numpy().astype(np.int32),
        silhouette=_silhouettes(unit, labels, graph).astype(np.float16),
        sample=sample.numpy().astype(np.int32),
        points=_principal_components(unit[sample.to(unit.device)].cpu().numpy()),
        distance=kind,
        reach=reach,
        eps=float(eps),
        edges=edges.astype(np.float32),
        counts=counts,
        anchors=anchors.numpy().astype(np.int32),
        neighbors=neighbors.numpy().astype(np.int32),
        similarity=similarity.numpy().astype(np.float16),
    )


def _spread(among: Tensor, count: int) -> Tensor:
    """Select ``count`` images, evenly spaced over the list."""
    count = min(count, len(among))
    return among[torch.arange(count) * len(among) // max(1, count)]


def _principal_components(unit: NDArray[np.float32]) -> NDArray[np.float16]:
    count = min(_COMPONENTS, *unit.shape)
    if not count:
        return np.zeros((len(unit), 0), dtype=np.float16)
    # A fixed seed leaves the random streams of the training unchanged.
    left, values, _ = randomized_svd(unit - unit.mean(axis=0), count, random_state=0)
    points: NDArray[np.float16] = (left * values).astype(np.float16)
    return points


def _nearest(unit: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    count = max(0, min(_NEIGHBORS, len(unit) - 1))
    rows = anchors.to(unit.device)
    similarity = unit[rows] @ unit.T
    similarity[torch.arange(len(rows)), rows] = -torch.inf
    best = similarity.topk(count, dim=1)
    return best.values.cpu(), best.indices.cpu()


def _silhouettes(unit: Tensor, labels: Tensor, graph: object) -> NDArray[np.floating]:
    """Compute silhouettes from stored distances, or from cosines to the centroids."""
    num_clusters = int(labels.max()) + 1 if len(labels) else 0
    if num_clusters < 2:
        return np.full(len(labels), np.nan)
    if graph is not None:
        return silhouette_samples(graph, labels.numpy())
    inside = (labels >= 0).to(unit.device)
    own = labels.to(unit.device)
    sums = unit.new_zeros(num_clusters, unit.shape[1])
    sums.index_add_(0, own[inside], unit[inside])
    centroids = F.normalize(sums, dim=1)
    result = unit.new_full((len(unit),), torch.nan)
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        distance = 1.0 - unit[part] @ centroids.T
        column = own[part].clamp(min=0)[:, None]
        within = distance.gather(1, column)[:, 0]
        between = distance.scatter(1, column, torch.inf).min(dim=1).values
        larger = torch.maximum(within, between).clamp(min=1e-12)
        result[part] = ((between - within) / larger).clamp(-1.0, 1.0)
    result[~inside] = torch.nan
    return result.cpu().numpy()


def _count_stored(
    rows: object,
    sample: Tensor,
    labels: Tensor,
    cameras: Tensor,
    edges: NDArray[np.float64],
) -> NDArray[np.int64]:
    pairs = rows.tocoo()  # type: ignore[attr-defined]  # SciPy ships no types
    first = sample[torch.from_numpy(pairs.row).long()]
    second = torch.from_numpy(pairs.col).long()
    distance = torch.from_numpy(pairs.data).double()
    others = (first != second) & (distance < 1.0)
    first, second, distance = first[others], second[others], distance[others]
    return _count(distance, first, second, labels, cameras, edges)


def _count_cosines(
    unit: Tensor,
    sample: Tensor,
    labels: Tensor,
    cameras: Tensor,
    edges: NDArray[np.float64],
) -> NDArray[np.int64]:
    chosen = unit[sample.to(unit.device)]
    row, column = torch.triu_indices(len(sample), len(sample), offset=1)
    distance = (1.0 - (chosen @ chosen.T).cpu()[row, column]).clamp(0.0, 2.0)
    first, second = sample[row], sample[column]
    return _count(distance, first, second, labels, cameras, edges)


def _count(
    distance: Tensor,
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    cameras: Tensor,
    edges: NDArray[np.float64],
) -> NDArray[np.int64]:
    known = (cameras[first] >= 0) & (cameras[second] >= 0)
    same = cameras[first] == cameras[second]
    together = (labels[first] == labels[second]) & (labels[first] >= 0)
    values = distance.numpy()
    groups = (known & same, known & ~same, ~known, together)
    return np.stack([np.histogram(values[g.numpy()], bins=edges)[0] for g in groups])

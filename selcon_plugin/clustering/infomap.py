"""Infomap on the nearest-neighbor graph, the labeler of CALR.

The settings (15 neighbors by inner product, edges from a similarity of 0.5 on, directed
two-level search, clusters of four images or fewer dropped) are those of the Infomap variant
of Cluster Contrast (Dai et al., ACCV 2022), which CALR (2024) also uses. Infomap groups the
images among which a random walker on the graph stays longest (Rosvall and Bergstrom, PNAS
2008).

The package ``infomap`` runs the search. It is not installed with this one: its metadata
gives the license GPL-3.0-or-later (release 2.16; early releases were under the AGPL-3.0),
while this package is under Apache-2.0. It runs as a program in a separate process: infomap
and faiss, which FastReID imports, are both wrapped by SWIG, whose iterator types clash in
one process, so that Python crashes (swig/swig issue 2913).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.copies import copy_groups
from selcon_plugin.clustering.knn import nearest_neighbors
from selcon_plugin.clustering.neighbors import Neighbors
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.installing import pip_install
from selcon_plugin.io.errors import ResourceError
from selcon_plugin.options import Interval

# The seed is fixed: equal graphs give equal labels.
_ARGUMENTS = ("--directed", "--two-level", "--clu", "--seed", "1", "--silent")


def _check_installed() -> None:
    if importlib.util.find_spec("infomap") is None:
        raise ImportError(
            "the Infomap labeler needs the package infomap (license GPL-3.0-or-later): "
            f"{pip_install('infomap>=2')}, or choose another labeler"
        )


def _run_infomap(
    source: NDArray[np.int64], target: NDArray[np.int64], weight: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Run the program on a list of links.

    Args:
        source: Source image of each link.
        target: Target image of each link.
        weight: Weight of each link.

    Returns:
        The images with links, and the module of each.

    Raises:
        ResourceError: If the program fails; the message contains its output.
    """
    with tempfile.TemporaryDirectory(prefix="selcon_infomap_") as folder:
        links = np.rec.fromarrays([source, target, weight])
        np.savetxt(Path(folder) / "links.txt", links, fmt="%d %d %.9g")
        # File names without a folder: the program splits its arguments at spaces.
        run = subprocess.run(
            [sys.executable, "-m", "infomap", "links.txt", ".", *_ARGUMENTS],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        modules = Path(folder) / "links.clu"
        if run.returncode or not modules.exists():
            raise ResourceError(
                f"infomap failed on {len(source)} links with exit code {run.returncode}: "
                f"{(run.stderr or run.stdout).strip()[-500:]}"
            )
        table = np.loadtxt(modules, dtype=np.int64, usecols=(0, 1), ndmin=2)
    return table[:, 0], table[:, 1]


def infomap_labels(
    neighbors: Neighbors, *, min_similarity: float, min_cluster_size: int
) -> NDArray[np.int64]:
    """Cluster the directed graph of nearest neighbors with two-level Infomap.

    Each image links to its sufficiently similar neighbors, with the similarity as weight.

    Args:
        neighbors: Nearest neighbors, with the image itself in column 0.
        min_similarity: Smallest similarity of a link, above 0.
        min_cluster_size: Images in the smallest cluster; images of smaller ones are
            outliers.

    Returns:
        Labels, numbered with gaps, -1 for an outlier, ``(M,)``.
    """
    _check_installed()
    similarity = neighbors.similarity[:, 1:].cpu().numpy()
    source, rank = np.nonzero(similarity >= min_similarity)
    labels = np.full(len(similarity), OUTLIER, dtype=np.int64)
    if not len(source):  # the program refuses a graph without links
        return labels
    target = neighbors.index[:, 1:].cpu().numpy()[source, rank]
    linked, modules = _run_infomap(source, target, similarity[source, rank])
    is_kept = np.bincount(modules)[modules] >= min_cluster_size
    labels[linked[is_kept]] = modules[is_kept]
    return labels


@register_labeler("Infomap")
class InfomapLabeler(Labeler):
    """Infomap on the graph of nearest neighbors by inner product.

    Args:
        k: Neighbors of each image, including itself.
        min_similarity: Smallest inner product of linked images.
        min_cluster_size: Images in the smallest cluster; images of smaller ones are
            outliers.

    Raises:
        ImportError: If the package ``infomap`` is not installed.
    """

    def __init__(
        self,
        *,
        k: Annotated[int, Interval(1)] = 15,
        min_similarity: Annotated[float, Interval(0, 1, above=True)] = 0.5,
        min_cluster_size: Annotated[int, Interval(1)] = 5,
    ) -> None:
        _check_installed()  # fail before the features are extracted
        self.k = k
        self.min_similarity = min_similarity
        self.min_cluster_size = min_cluster_size

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Find the neighbors and cluster.

        Args:
            features: Unit vectors ``(M, C)``.

        Returns:
            The labels, without distances.
        """
        groups = copy_groups(features)
        first, number = np.unique(groups, return_inverse=True)
        if np.bincount(groups).max(initial=0) < self.k:
            first = number = np.arange(len(features))
        else:  # so many copies have only each other as neighbors
            features = features[torch.from_numpy(first).to(features.device)]
        labels = infomap_labels(
            nearest_neighbors(features, self.k),
            min_similarity=self.min_similarity,
            min_cluster_size=1,
        )[number]
        inside = labels != OUTLIER
        sizes = np.bincount(labels[inside])
        inside[inside] = sizes[labels[inside]] >= self.min_cluster_size
        return PseudoLabels.numbered(np.where(inside, labels, OUTLIER))

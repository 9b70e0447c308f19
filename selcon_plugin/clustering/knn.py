"""Nearest neighbors of every image among all images, by inner product.

Shape shorthand in this module:

    M: images
    C: feature dimension
    k: neighbors per image, including the image itself
    R: rows processed at a time
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from selcon_plugin.clustering.neighbors import Neighbors, torch_neighbors
from selcon_plugin.installing import install_command

logger = logging.getLogger(__name__)

KnnBackend = Literal["auto", "torch", "shortlist", "faiss", "ivf"]

SMALL = 2_000  # up to this many images one plain matrix product is fast enough
HUGE = 2_000_000  # beyond this many images an exact search on a CPU takes hours


@torch.no_grad()
def nearest_neighbors(
    features: Tensor, k: int, *, backend: KnnBackend = "auto"
) -> Neighbors:
    """Find the k nearest images of each image; the first one is the image itself.

    All backends except ``"ivf"`` are exact: they return the result of float32 inner
    products for any number of threads; only images whose products differ by less than
    float32 rounding may be ordered differently by different backends. No backend holds
    M x M values in memory.

    Args:
        features: Unit vectors, shape ``(M, C)``, on any device.
        k: Neighbors per image, including the image itself, at least 1; clamped to M.
        backend: ``"torch"``: chunked products on the device of the features.
            ``"shortlist"``: each product of two images is computed once on the CPU, in
            bfloat16 where that is faster, and the candidates that a proven error bound
            leaves are ranked again in float32; needs numba. ``"faiss"``: faiss' flat index.
            ``"ivf"``: faiss' inverted lists, approximate, for millions of images. With
            features on a GPU both need a faiss with GPU support; otherwise torch is used.
            ``"auto"`` chooses by device, size and installed packages, and logs the choice.

    Returns:
        Similarities and image indices, both ``(M, k)``, on the device of the features.

    Raises:
        ValueError: If the features are not a finite matrix, k is less than 1 or the
            backend is unknown.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be (M, C), got shape {tuple(features.shape)}")
    if k < 1:
        raise ValueError(f"k counts the image itself and must be at least 1, got {k}")
    if backend not in get_args(KnnBackend):
        known = ", ".join(get_args(KnnBackend))
        raise ValueError(f"backend must be one of {known}, got {backend!r}")
    features = features.detach().float()
    check_finite(features)
    k = min(k, len(features))
    chosen, reason = (backend, "requested") if backend != "auto" else _choose(features)
    if chosen in ("faiss", "ivf"):
        faiss = _import_faiss(chosen)
        if features.is_cuda and faiss.get_num_gpus() == 0:
            chosen, reason = "torch", "the installed faiss has no GPU support"
    logger.info(
        "%d nearest neighbors of %d images: %s (%s)", k, len(features), chosen, reason
    )
    if k == 0:
        empty = features.new_empty(0, 0)
        return Neighbors(empty, empty.long())
    with _full_precision(features.device.type):
        if chosen == "torch":
            return torch_neighbors(features, k)
        if chosen == "shortlist":
            return _shortlist(features, k)
        return _faiss_neighbors(faiss, features, k, approximate=chosen == "ivf")


def check_finite(features: Tensor) -> None:
    """Refuse features with NaN or infinite values.

    Args:
        features: Shape ``(M, C)``.

    Raises:
        ValueError: If a feature is not finite; the message names the first such image.
    """
    nonfinite = (~features.norm(dim=1).isfinite()).nonzero()[:, 0]
    if len(nonfinite):
        raise ValueError(
            f"features of image {int(nonfinite[0])} are not finite ({len(nonfinite)} of "
            f"{len(features)} images): the network has diverged, or the file is damaged"
        )


def _choose(features: Tensor) -> tuple[str, str]:
    if features.device.type != "cpu":
        return "torch", f"the features are on {features.device.type}"
    if len(features) <= SMALL:
        return "torch", f"at most {SMALL} images"
    has_faiss = importlib.util.find_spec("faiss") is not None
    if len(features) > HUGE and has_faiss:
        return "ivf", f"approximate: more than {HUGE} images on a CPU"
    if importlib.util.find_spec("numba") is not None:
        return "shortlist", "numba is installed"
    if has_faiss:
        return "faiss", "numba is not installed"
    return "torch", "neither numba nor faiss is installed"


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    # Neither TF32 nor an enclosing autocast may reduce the precision of the products.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _shortlist(features: Tensor, k: int) -> Neighbors:
    # Compiled code is imported only when used: numba may be missing.
    from selcon_plugin.clustering.compiled.shortlist import shortlist_neighbors

    found = shortlist_neighbors(features.cpu(), k)
    return Neighbors(*(part.to(features.device) for part in found))


def _import_faiss(backend: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"backend={backend!r} needs faiss: {install_command('search')}, or use "
            "backend='auto'"
        ) from error
    return faiss


def _faiss_neighbors(
    faiss: Any, features: Tensor, k: int, *, approximate: bool
) -> Neighbors:
    num_images, dim = features.shape
    array = features.cpu().contiguous().numpy()
    index = faiss.IndexFlatIP(dim)
    if approximate:
        # The usual 4 √M lists, fewer if faiss would have too few training points per list.
        num_lists = max(1, min(round(4 * num_images**0.5), num_images // 39))
        index = faiss.IndexIVFFlat(index, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, min(64, num_lists))
    if features.is_cuda:
        index = faiss.index_cpu_to_all_gpus(index)
    if approximate:
        index.train(array)
    index.add(array)
    similarity, column = (torch.from_numpy(part) for part in index.search(array, k))
    found = _own_first(features.cpu(), similarity, column)
    # Probed inverted lists with too few images leave empty results.
    short = (found.index < 0).any(dim=1).nonzero()[:, 0]
    if len(short):
        exact = torch_neighbors(features.cpu(), k, short)
        found.similarity[short], found.index[short] = exact
    return Neighbors(*(part.to(features.device) for part in found))


def _own_first(features: Tensor, similarity: Tensor, index: Tensor) -> Neighbors:
    """Move each image into its column 0 and sort the others."""
    own = torch.arange(len(index))[:, None]
    missing = ~(index == own).any(dim=1)  # crowded out by exact duplicates
    index[missing, -1] = own[missing, 0]
    similarity[index == own] = torch.inf
    index, by_number = index.sort(dim=1)
    similarity, order = similarity.gather(1, by_number).sort(
        dim=1, descending=True, stable=True
    )
    similarity[:, 0] = features.square().sum(dim=1)
    return Neighbors(similarity, index.gather(1, order))

"""Nearest neighbors of every image among all images, by inner product.

Shape shorthand in this module:

    M: images
    C: feature dimension
    k: neighbors per image, the image itself included
    R: rows handled at a time
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

logger = logging.getLogger(__name__)

KnnBackend = Literal["auto", "torch", "shortlist", "faiss", "ivf"]

SMALL = 2_000  # images up to which one plain product is quick enough
HUGE = 2_000_000  # images from which an exact search on a CPU takes hours


@torch.no_grad()
def nearest_neighbors(
    features: Tensor, k: int, *, backend: KnnBackend = "auto"
) -> Neighbors:
    """Find the k nearest images of each image, itself first.

    All backends but ``"ivf"`` are exact: they return what float32 inner products give,
    whatever the number of threads; only images whose products differ by less than float32
    rounding may swap places between backends. No backend holds M x M numbers.

    Args:
        features: Unit vectors, shape ``(M, C)``, on any device.
        k: Neighbors per image, itself included, at least 1; clamped to M.
        backend: ``"torch"``: products in pieces, on the device of the features.
            ``"shortlist"``: on the CPU, every product of two images taken once, in bfloat16
            where that is faster, and what a proven error bound leaves in doubt ranked again
            in float32; needs numba. ``"faiss"``: faiss' flat index. ``"ivf"``: faiss'
            inverted lists, approximate, for millions of images. With features on a GPU both
            need a faiss that has GPUs, else torch takes over. ``"auto"`` chooses by device,
            size and what is installed, and logs the choice.

    Returns:
        Similarities and images, both ``(M, k)``, on the device of the features.

    Raises:
        ValueError: If the features are no matrix or not finite, k is less than 1 or the
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
    chosen, reason = (backend, "asked for") if backend != "auto" else _choose(features)
    if chosen in ("faiss", "ivf"):
        faiss = _import_faiss(chosen)
        if features.is_cuda and faiss.get_num_gpus() == 0:
            chosen, reason = "torch", "the installed faiss has no GPUs"
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
    """Refuse features that hold NaN or infinity.

    Args:
        features: Shape ``(M, C)``.

    Raises:
        ValueError: Names the first such image.
    """
    bad = (~features.norm(dim=1).isfinite()).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"features of image {int(bad[0])} are not finite ({len(bad)} such images of "
            f"{len(features)}): the network has diverged, or the file is damaged"
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
    # Neither TF32 nor a surrounding autocast may touch the products.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _shortlist(features: Tensor, k: int) -> Neighbors:
    # Compiled code is loaded only where it is used.
    from selcon_plugin.clustering.compiled.shortlist import shortlist_neighbors

    found = shortlist_neighbors(features.cpu(), k)
    return Neighbors(*(part.to(features.device) for part in found))


def _import_faiss(backend: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"backend={backend!r} needs faiss: pip install faiss-cpu, or use backend='auto'"
        ) from error
    return faiss


def _faiss_neighbors(
    faiss: Any, features: Tensor, k: int, *, approximate: bool
) -> Neighbors:
    num_images, dim = features.shape
    array = features.cpu().contiguous().numpy()
    index = faiss.IndexFlatIP(dim)
    if approximate:
        # The usual 4 √M lists, fewer where they would hold less than faiss trains on.
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
    # An inverted list that is too short leaves places empty.
    short = (found.index < 0).any(dim=1).nonzero()[:, 0]
    if len(short):
        exact = torch_neighbors(features.cpu(), k, short)
        found.similarity[short], found.index[short] = exact
    return Neighbors(*(part.to(features.device) for part in found))


def _own_first(features: Tensor, similarity: Tensor, index: Tensor) -> Neighbors:
    """Put each image into its column 0 and the rest into order."""
    own = torch.arange(len(index))[:, None]
    missing = ~(index == own).any(dim=1)  # many duplicates, none better than the others
    index[missing, -1] = own[missing, 0]
    similarity[index == own] = torch.inf
    index, by_number = index.sort(dim=1)
    similarity, order = similarity.gather(1, by_number).sort(
        dim=1, descending=True, stable=True
    )
    similarity[:, 0] = features.square().sum(dim=1)
    return Neighbors(similarity, index.gather(1, order))

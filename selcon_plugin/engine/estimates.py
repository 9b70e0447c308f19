"""Estimates of the time and memory that extraction and clustering will need."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from selcon_plugin.engine.progress import duration

__all__ = [
    "Estimate",
    "available_memory",
    "check_memory",
    "clustering_estimate",
    "extraction_estimate",
    "product_rate",
]

# The constants describe clustering on a CPU. They are fitted to bench_clustering.py and to
# folders of real crops; the tests hold them to a factor of four.
# Time of the neighbor search, as a fraction of the time of all pairwise products:
_SEARCH_RATIO = 0.4
# Time per image of the distance and of one clustering at each of 26 values of eps:
_SECONDS_PER_IMAGE = 3e-4
# Time to compile or load the kernels, and of everything small:
_SECONDS_FIXED = 3.0
# Memory in addition to the features, their copy in half precision and the k neighbors: the
# sparse distances, which exist several times while they are computed.
_BYTES_PER_IMAGE = 4_000
_BYTES_PER_NEIGHBOR = 12
_BYTES_FIXED = 200 * 2**20
# Fraction of the available memory that may be used.
_HEADROOM = 0.9

_MEMORY_INFO = Path("/proc/meminfo")
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GROUP_USE = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Estimate:
    """Expected cost of a computation.

    Attributes:
        seconds: Time in seconds.
        memory: Bytes in addition to those that the process already uses.
    """

    seconds: float
    memory: int

    def __add__(self, other: Estimate) -> Estimate:
        """Return the cost of both computations, one after the other."""
        return Estimate(self.seconds + other.seconds, max(self.memory, other.memory))

    def __str__(self) -> str:
        time_needed = duration(self.seconds, approximate=True)
        return f"about {time_needed} and {_size(self.memory)} of memory"


def _size(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def extraction_estimate(
    embed: Callable[[int], object], num_images: int, dim: int, *, batch_size: int
) -> Estimate:
    """Measure the time of the first images and extrapolate to all of them.

    Args:
        embed: Computes the features of the first n images.
        num_images: Number of images in total.
        dim: Feature dimension.
        batch_size: Images computed together.

    Returns:
        Time and memory of all features, which exist twice for a moment.
    """
    count = min(batch_size, num_images)
    embed(min(2, count))  # warm-up: the first call allocates and compiles
    started = time.perf_counter()
    embed(count)
    seconds = (time.perf_counter() - started) * num_images / count
    return Estimate(seconds, 2 * 4 * dim * num_images)


def clustering_estimate(
    num_images: int, dim: int, *, k1: int, products_per_second: float
) -> Estimate:
    """Estimate the cost of clustering by formula.

    Clustering takes ``0.4 M^2 C / r + 0.0003 M + 3`` seconds, with M images, feature
    dimension C and r products per second, and ``M (6 C + 12 k1 + 4000)`` bytes plus 200
    MiB. The constants are those of the Jaccard distance and DBSCAN with eps "auto" on a
    CPU; a GPU or a fixed eps takes less time.

    Args:
        num_images: Number of images M.
        dim: Feature dimension C.
        k1: Neighbors of each image.
        products_per_second: Speed of the machine, see :func:`product_rate`.

    Returns:
        Expected time and memory.
    """
    search = _SEARCH_RATIO * num_images**2 * dim / products_per_second
    per_image = 6 * dim + _BYTES_PER_NEIGHBOR * k1 + _BYTES_PER_IMAGE
    return Estimate(
        search + _SECONDS_PER_IMAGE * num_images + _SECONDS_FIXED,
        num_images * per_image + _BYTES_FIXED,
    )


def product_rate(dim: int, device: str = "cpu") -> float:
    """Measure how many multiply-adds this machine computes per second.

    Args:
        dim: Length of the vectors; use the feature dimension.
        device: Device to measure.

    Returns:
        Multiply-adds per second of a float32 matrix product; the best of three runs.
    """
    rows, columns = 512, 2048
    left, right = (
        torch.ones(rows, dim, device=device),
        torch.ones(dim, columns, device=device),
    )
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((left @ right)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return rows * columns * dim / best


def available_memory() -> int | None:
    """Return how many bytes this process may still allocate; None where it is unknown."""
    if not _MEMORY_INFO.exists():
        return None
    text = _MEMORY_INFO.read_text("utf-8")
    lines = dict(line.split(":") for line in text.splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    if _GROUP_LIMIT.exists() and _GROUP_USE.exists():
        limit = _GROUP_LIMIT.read_text("utf-8").strip()
        if limit != "max":  # the limit of a container
            used = int(_GROUP_USE.read_text("utf-8"))
            available = min(available, int(limit) - used)
    return max(0, available)


def check_memory(estimate: Estimate, what: str) -> None:
    """Refuse a computation that needs more memory than is available.

    Args:
        estimate: Cost of the computation.
        what: Name of the computation, for the error message.

    Raises:
        ValueError: If too little memory is available.
    """
    available = available_memory()
    if available is None or estimate.memory <= _HEADROOM * available:
        return
    raise ValueError(
        f"{what} needs about {_size(estimate.memory)} of memory, but of this machine's "
        f"{_size(_total_memory())} only {_size(available)} are available: close other "
        "programs, use fewer images, or use a machine with more memory"
    )


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""What a folder of images will take, said before it is begun: time and memory."""

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

# Clustering on a CPU, fitted to bench_clustering.py and to folders of real crops; the tests
# hold it to a factor of four. The search for neighbors, as a share of the time of all
# products of two images:
_SEARCH_RATIO = 0.4
# What the distance, and a clustering at each of 26 eps, take per image:
_SECONDS_PER_IMAGE = 3e-4
# Compiling or loading the kernels, and whatever is small:
_SECONDS_FIXED = 3.0
# Beside features, their copy in half precision and the k neighbors: the sparse distances,
# several times while they are made.
_BYTES_PER_IMAGE = 4_000
_BYTES_PER_NEIGHBOR = 12
_BYTES_FIXED = 200 * 2**20
# Of what is available, what must be left.
_HEADROOM = 0.9

_MEMORY_INFO = Path("/proc/meminfo")
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GROUP_USE = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Estimate:
    """Expected cost of a piece of work.

    Attributes:
        seconds: Time.
        memory: Bytes beyond what the process holds.
    """

    seconds: float
    memory: int

    def __add__(self, other: Estimate) -> Estimate:
        """Return the cost of one after the other."""
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
    """Measure the first images, and expect the others to take as long each.

    Args:
        embed: Computes the features of the first n images.
        num_images: Images in all.
        dim: Length of a feature.
        batch_size: Images computed together.

    Returns:
        Time and memory of all features, which are held twice for a moment.
    """
    count = min(batch_size, num_images)
    embed(min(2, count))  # the first call sets up what later ones have
    started = time.perf_counter()
    embed(count)
    seconds = (time.perf_counter() - started) * num_images / count
    return Estimate(seconds, 2 * 4 * dim * num_images)


def clustering_estimate(
    num_images: int, dim: int, *, k1: int, products_per_second: float
) -> Estimate:
    """Tell what clustering takes, by formula.

    ``0.4 M^2 C / r + 0.0003 M + 3`` seconds, with M images, C values in a feature and r
    products per second; and ``M (6 C + 12 k1 + 4000)`` bytes plus 200 MiB. The constants
    are those of the Jaccard distance and DBSCAN with eps "auto" on a CPU; a GPU needs less
    time, a fixed eps less as well.

    Args:
        num_images: Images M.
        dim: Length C of a feature.
        k1: Neighbors of each image.
        products_per_second: Speed of the machine, see :func:`product_rate`.

    Returns:
        Time and memory.
    """
    search = _SEARCH_RATIO * num_images**2 * dim / products_per_second
    per_image = 6 * dim + _BYTES_PER_NEIGHBOR * k1 + _BYTES_PER_IMAGE
    return Estimate(
        search + _SECONDS_PER_IMAGE * num_images + _SECONDS_FIXED,
        num_images * per_image + _BYTES_FIXED,
    )


def product_rate(dim: int, device: str = "cpu") -> float:
    """Measure how many products of two numbers this machine takes and adds in a second.

    Args:
        dim: Length of the vectors, as that of the features.
        device: Where to compute.

    Returns:
        Products per second in float32, of a product of matrices; the best of three.
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
    """Return how many bytes this process may still take; None where that is not known."""
    if not _MEMORY_INFO.exists():
        return None
    lines = dict(line.split(":") for line in _MEMORY_INFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    if _GROUP_LIMIT.exists() and _GROUP_USE.exists():
        limit = _GROUP_LIMIT.read_text().strip()
        if limit != "max":  # a container's
            available = min(available, int(limit) - int(_GROUP_USE.read_text()))
    return max(0, available)


def check_memory(estimate: Estimate, what: str) -> None:
    """Refuse work that needs more memory than there is.

    Args:
        estimate: What it needs.
        what: The work, for the message.

    Raises:
        ValueError: If too little is available.
    """
    available = available_memory()
    if available is None or estimate.memory <= _HEADROOM * available:
        return
    raise ValueError(
        f"{what} needs about {_size(estimate.memory)} of memory, and of this machine's "
        f"{_size(_total_memory())} only {_size(available)} are available: end other "
        "programs, take a part of the images, or a machine with more"
    )


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""Batch streams, in which each batch is a function of the settings and the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Sampler

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Sample of a sampler.

    Attributes:
        index: Image index, 0..M-1.
        position: Position in the stream of the whole run, counted over all processes:
            B * number of the batch + position in the batch.
    """

    index: int
    position: int


class BatchStream(Sampler[SampleKey], ABC):
    """Base class of samplers: an endless stream of global batches, split over the ranks.

    Args:
        batch_size: Images B in a batch, over all processes.
        seed: Random seed, equal on all ranks.
        rank: Rank of this process.
        world_size: Number of processes W.

    Attributes:
        start: Number of the batch at which the next iteration starts; set it to resume.

    Raises:
        ValueError: If the batch is not a positive multiple of the number of processes.
    """

    def __init__(
        self, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size ({batch_size}, over all processes) must be a positive "
                f"multiple of the number of processes ({world_size})"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = 0

    @abstractmethod
    def batches(self, start: int) -> Iterator[Indices]:
        """Sample the global batches ``start``, ``start + 1``, ... endlessly.

        Args:
            start: Number of the first batch.

        Yields:
            Image indices of one batch, shape ``(B,)``; the same on all ranks.
        """

    def __iter__(self) -> Iterator[SampleKey]:
        per_rank = self.batch_size // self.world_size
        first = self.rank * per_rank
        start = self.start
        for number, images in enumerate(self.batches(start), start):
            position = number * self.batch_size + first
            for place, index in enumerate(images[first : first + per_rank].tolist()):
                yield SampleKey(index, position + place)


def shuffled_passes(
    num_images: int,
    batch_size: int,
    start: int,
    pass_generator: Callable[[int], np.random.Generator],
) -> Iterator[Indices]:
    """Split endless shuffled passes over all images into batches, from batch ``start``."""
    number, place = divmod(start * batch_size, num_images)
    pending = pass_generator(number).permutation(num_images)[place:]
    while True:
        while len(pending) < batch_size:
            number += 1
            order = pass_generator(number).permutation(num_images)
            pending = np.concatenate([pending, order])
        yield pending[:batch_size]
        pending = pending[batch_size:]


class StreamSampler(BatchStream):
    """Sampler of consecutive shuffled passes over all images.

    Position n of the stream is entry n % M of pass n // M, a permutation seeded by ``(seed,
    pass)``, so any position can be computed without the previous ones.

    Args:
        num_images: Number of images M.
        batch_size: Images B in a batch, over all processes; 1 gives a plain stream of
            images.
        seed: Seed of the permutations, equal on all ranks.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are no images, or the batch is not a multiple of the number of
            processes.

    Example:
        >>> stream = iter(StreamSampler(3, seed=0))
        >>> sorted(next(stream).index for _ in range(3))
        [0, 1, 2]
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        if num_images < 1:
            raise ValueError("there are no images to sample from")
        self.num_images = num_images

    def batches(self, start: int) -> Iterator[Indices]:
        """Sample the global batches ``start``, ``start + 1``, ...; see the base class."""
        return shuffled_passes(
            self.num_images,
            self.batch_size,
            start,
            lambda number: np.random.default_rng((self.seed, number)),
        )


def whole_numbers(name: str, values: Tensor | ArrayLike) -> Indices:
    """Return a vector of integers as int64, and refuse anything else.

    Args:
        name: Name of the argument, for the error.
        values: Integers, shape ``(M,)``.

    Returns:
        The same on the CPU.

    Raises:
        ValueError: If the shape or the type differs.
    """
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers of shape (M,), got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.int64, copy=False)

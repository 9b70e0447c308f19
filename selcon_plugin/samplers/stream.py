"""Batch streams: batches as a function of the settings and the step."""

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
    """One draw of a sampler.

    Attributes:
        index: Image, 0..M-1.
        position: Place of the draw in the whole run's stream, counted over all processes:
            B * number of the batch + place in the batch.
    """

    index: int
    position: int


class BatchStream(Sampler[SampleKey], ABC):
    """Base of the samplers: an endless stream of global batches, dealt to the ranks.

    Args:
        batch_size: Images B in a batch, over all processes.
        seed: Seed of all draws, equal on all ranks.
        rank: This process.
        world_size: Number of processes W.

    Attributes:
        start: Number of the batch at which the next iteration begins; set it to resume.

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
        """Draw the global batches ``start``, ``start + 1``, ... without end.

        Args:
            start: Number of the first batch.

        Yields:
            Images of one batch, shape ``(B,)``; the same on all ranks.
        """

    def __iter__(self) -> Iterator[SampleKey]:
        share = self.batch_size // self.world_size
        first = self.rank * share
        start = self.start
        for number, images in enumerate(self.batches(start), start):
            position = number * self.batch_size + first
            for place, index in enumerate(images[first : first + share].tolist()):
                yield SampleKey(index, position + place)


def _shuffled_passes(
    num_images: int,
    batch_size: int,
    start: int,
    generator_of_pass: Callable[[int], np.random.Generator],
) -> Iterator[Indices]:
    """Cut endless shuffled passes over all images into batches; begin at any of them."""
    number, place = divmod(start * batch_size, num_images)
    waiting = generator_of_pass(number).permutation(num_images)[place:]
    while True:
        while len(waiting) < batch_size:
            number += 1
            order = generator_of_pass(number).permutation(num_images)
            waiting = np.concatenate([waiting, order])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


class StreamSampler(BatchStream):
    """Shuffled passes over all images, one after the other.

    Position n of the stream is place n % M of pass n // M, a permutation seeded by ``(seed,
    pass)``: it is known without drawing what came before.

    Args:
        num_images: Images M.
        batch_size: Images B in a batch, over all processes; 1 makes it a plain stream of
            images.
        seed: Seed of the permutations, equal on all ranks.
        rank: This process.
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
        """Draw the global batches ``start``, ``start + 1``, ...; see the base class."""
        return _shuffled_passes(
            self.num_images,
            self.batch_size,
            start,
            lambda number: np.random.default_rng((self.seed, number)),
        )


def _whole_numbers(name: str, values: Tensor | ArrayLike) -> Indices:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be whole numbers of shape (M,), got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.int64, copy=False)

"""Samplers: which images make up a batch. Seeded, resumable and right under DDP.

A sampler yields :class:`SampleKey` and not a bare index: the position in the stream seeds
the augmentation of that very sample, so that neither the number of loader workers, nor the
number of processes, nor a resumed run changes what the model sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True, slots=True)
class SampleKey:
    """One draw of a sampler.

    Attributes:
        index: Image, 0..M-1.
        position: Place of the draw in the whole run's stream, counted over all processes.
    """

    index: int
    position: int


class StreamSampler(Sampler[SampleKey]):
    """Endless stream of shuffled passes over all images.

    Pass p is a permutation seeded by ``(seed, p)``: position n of the stream is known
    without drawing what came before, so that a resumed run starts at any position at once.
    Rank r of W gets positions r, r + W, r + 2W, ...

    Args:
        num_images: Images M.
        seed: Seed of the permutations, equal on all ranks.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        start: Position at which the next iteration begins; set it to resume.

    Raises:
        ValueError: If there are no images.

    Example:
        >>> stream = iter(StreamSampler(3, seed=0))
        >>> sorted(next(stream).index for _ in range(3))
        [0, 1, 2]
    """

    def __init__(
        self, num_images: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_images < 1:
            raise ValueError("there are no images to sample from")
        self.num_images = num_images
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = 0

    def __iter__(self) -> Iterator[SampleKey]:
        position = self.start + self.rank
        current_pass, order = -1, np.empty(0, dtype=np.int64)
        while True:
            wanted_pass, place = divmod(position, self.num_images)
            if wanted_pass != current_pass:
                generator = np.random.default_rng((self.seed, wanted_pass))
                order = generator.permutation(self.num_images)
                current_pass = wanted_pass
            yield SampleKey(int(order[place]), position)
            position += self.world_size

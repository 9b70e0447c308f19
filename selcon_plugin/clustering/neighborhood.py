"""Neighborhood sizes as a function of the number of images per person."""

from __future__ import annotations

from dataclasses import dataclass

# Neighbors per image of a person: 30 for the 17 images of Market-1501's persons.
_K1_RATIO, _SMALLEST_K1, _LARGEST_K1 = 1.75, 4, 30
_K2_RATIO, _LARGEST_K2 = 0.25, 6
# Images per person below which two, or three, neighbors make a core image.
_TWO, _THREE = 6, 12
MOST_NEIGHBORS = _LARGEST_K1


@dataclass(frozen=True)
class NeighborhoodSizes:
    """Neighborhood sizes of the Jaccard distance and of DBSCAN.

    Attributes:
        k1: Neighbors in the Jaccard distance.
        k2: Neighbors averaged by query expansion.
        min_samples: Neighbors, including the image itself, that make a core image.
    """

    k1: int = 30
    k2: int = 6
    min_samples: int = 4

    @classmethod
    def for_people(cls, images_per_person: float) -> NeighborhoodSizes:
        """Choose the sizes for a number of images per person.

        What matters is how many images a person has, whatever their total number: an image
        with fewer mates than neighbors lists other persons. From 17 images per person on,
        the sizes are the published ones: 30, 6 and 4.

        Args:
            images_per_person: Images of a person, on average, m.

        Returns:
            k1 = 1.75 m within 4..30, k2 = k1 / 4 within 1..6, and min_samples 2 below 6
            images, 3 below 12, and 4 otherwise.

        Example:
            >>> NeighborhoodSizes.for_people(4)
            NeighborhoodSizes(k1=7, k2=2, min_samples=2)
        """
        k1 = min(_LARGEST_K1, max(_SMALLEST_K1, round(_K1_RATIO * images_per_person)))
        k2 = min(_LARGEST_K2, max(1, round(_K2_RATIO * k1)))
        samples = 2 + (images_per_person >= _TWO) + (images_per_person >= _THREE)
        return cls(k1, k2, samples)

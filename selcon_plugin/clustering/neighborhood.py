"""Default neighborhood sizes as a function of the number of images."""

from __future__ import annotations

from dataclasses import dataclass

# Below this many images the published sizes merge different persons: on 100 to 800 images
# of Market-1501's training identities, 5 or 18 images each, with features of an OSNet
# trained on MSMT17, the agreement of clusters and identities (AMI, mean of the two) was
# lower by 0.05 to 0.25.
_SMALL_SET = 1000
_SMALL_SET_K1, _MIN_K1 = 15, 8


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
    def for_images(cls, num_images: int) -> NeighborhoodSizes:
        """Choose the sizes for a number of images.

        From 1,000 images on, the sizes are the published ones: 30, 6 and 4. In smaller sets
        each person has fewer images: k1 is a tenth of the images, clamped to 8..15, k2 a
        fifth of k1, and three images make a core.

        Args:
            num_images: Number of images M.

        Returns:
            The sizes.

        Example:
            >>> NeighborhoodSizes.for_images(120)
            NeighborhoodSizes(k1=12, k2=2, min_samples=3)
        """
        if num_images >= _SMALL_SET:
            return cls()
        k1 = min(_SMALL_SET_K1, max(_MIN_K1, num_images // 10))
        return cls(k1, k1 // 5, min_samples=3)

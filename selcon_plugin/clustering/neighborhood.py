"""How many neighbors to look at, by the number of images."""

from __future__ import annotations

from dataclasses import dataclass

# Below this many images the published sizes join different people: in 100 to 800 images of
# Market-1501's training people, 5 or 18 of each, seen by an OSNet that was trained on
# MSMT17, clusters agreed with identities by 0.05 to 0.25 (AMI, mean of the two) less.
_FEW_IMAGES = 1000
_FEW_K1, _LEAST_K1 = 15, 8


@dataclass(frozen=True)
class NeighborhoodSizes:
    """How many neighbors the Jaccard distance and DBSCAN look at.

    Attributes:
        k1: Neighbors in the Jaccard distance.
        k2: Neighbors averaged by its query expansion.
        min_samples: Neighbors, itself included, that make a core image.
    """

    k1: int = 30
    k2: int = 6
    min_samples: int = 4

    @classmethod
    def for_images(cls, num_images: int) -> NeighborhoodSizes:
        """Choose sizes by the number of images.

        From 1,000 images on they are the published ones, 30, 6 and 4. Of fewer images each
        has fewer others of its person: k1 is 15, or a tenth of the images but at least 8,
        k2 a fifth of it, and three images make a core.

        Args:
            num_images: Images M.

        Returns:
            The sizes.

        Example:
            >>> NeighborhoodSizes.for_images(120)
            NeighborhoodSizes(k1=12, k2=2, min_samples=3)
        """
        if num_images >= _FEW_IMAGES:
            return cls()
        k1 = min(_FEW_K1, max(_LEAST_K1, num_images // 10))
        return cls(k1, k1 // 5, min_samples=3)

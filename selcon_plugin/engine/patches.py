"""Random patches whose source is the list of images, not the images read before.

``RandomPatch`` of FastReID and torchreid pastes a patch of another image, and keeps a pool
of patches of up to 50,000 earlier images for that. The pool differs between the processes
that read images, depends on their number, and is empty after a resume. Here each patch is
taken from an image that the seed of the sample selects. This is a patch of a random image
as before, but the sample depends on nothing else.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["transformed"]

_Read = Callable[[], Any]


class _FixedPool(list[Any]):
    """Pool of patches to which the host's transform adds none."""

    def append(self, patch: Any) -> None:
        """Ignore a patch of the image that gets one."""


def transformed(transform: Callable[[Any], Any], image: Any, read_other: _Read) -> Any:
    """Transform an image, with patches that depend on the random streams only.

    Args:
        transform: The host's transform; a composition may contain ``RandomPatch``.
        image: Image to transform.
        read_other: Reads a random training image; may return None.

    Returns:
        The transformed image.
    """
    steps = getattr(transform, "transforms", (transform,))
    if not any(_keeps_patches(step) for step in steps):
        return transform(image)
    for number, step in enumerate(steps):
        if _keeps_patches(step):
            image = _with_patch(step, image, steps[:number], read_other)
        else:
            image = step(image)
    return image


def _keeps_patches(step: Any) -> bool:
    return hasattr(step, "patchpool") and hasattr(step, "min_sample_size")


def _with_patch(step: Any, image: Any, before: Sequence[Any], read_other: _Read) -> Any:
    """Paste a patch of another image with the probability of the host's transform."""
    if random.uniform(0, 1) > step.prob_happen:
        return image
    other = read_other()
    if other is None:
        return image
    for earlier in before:
        if not _keeps_patches(earlier):
            other = earlier(other)
    # The host's code cuts and pastes: with too few patches it only cuts.
    cutting, pasting = copy.copy(step), copy.copy(step)
    cutting.patchpool, cutting.min_sample_size = [], 2
    cutting(other)
    pasting.patchpool = _FixedPool(cutting.patchpool)
    pasting.min_sample_size, pasting.prob_happen = 1, 1.0
    return pasting(image)

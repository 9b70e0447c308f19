"""Images that cannot be read: found before the training, counted during it, and bounded."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from selcon_plugin.datasets.reading import describe_faults, fault_of, find_unreadable
from selcon_plugin.distributed import broadcast_tensor, group_device, rank, world_size
from selcon_plugin.engine.images import IndexedImages, Item

logger = logging.getLogger(__name__)

_LISTED = 100  # lines of an error


class BadImagesError(ValueError):
    """Too many images cannot be read; the message lists them and says what to do."""


def readable_items(
    items: Sequence[Item], max_unreadable_ratio: float
) -> tuple[list[Item], int]:
    """Leave out images that cannot be read; say in one warning which and why.

    Every file is decoded once, on the main process; the others follow it.

    Args:
        items: Path, identity and camera of each image.
        max_unreadable_ratio: Share of them that may be left out.

    Returns:
        The readable ones, sorted by path, and how many were left out.

    Raises:
        BadImagesError: If the share is larger, or no image is left.
    """  # noqa: DOC502  (raised by what this calls)
    items = sorted(items, key=lambda item: item[0])
    faults = _faults([item[0] for item in items])
    if faults:
        check_unreadable_ratio(list(faults.values()), len(items), max_unreadable_ratio)
        logger.warning(
            "%d of %d images cannot be read and are left out:\n%s",
            len(faults),
            len(items),
            describe_faults(list(faults.values())),
        )
    return [item for item in items if item[0] not in faults], len(faults)


def check_unreadable_ratio(
    faults: Sequence[str],
    num_images: int,
    max_unreadable_ratio: float,
    *,
    num_unlisted: int = 0,
    all_read: bool = True,
) -> None:
    """Refuse a set of images of which too many cannot be read.

    Args:
        faults: Path and reason of each image that cannot be read.
        num_images: Images in total.
        max_unreadable_ratio: Fraction of them that may be unreadable. Whatever it is, one
            image must be left.
        num_unlisted: Unreadable images that ``faults`` does not list.
        all_read: Whether every image has been tried; otherwise there may be more faults.

    Raises:
        BadImagesError: If more images cannot be read, or none can.
    """
    num_unreadable = len(faults) + num_unlisted
    if num_unreadable <= max_unreadable_ratio * num_images and num_unreadable < num_images:
        return
    raise BadImagesError(
        f"{num_unreadable} of {num_images} images{'' if all_read else ', or more,'} cannot "
        f"be read, more than the fraction of {max_unreadable_ratio:g} that "
        f"max_unreadable_ratio allows:\n{describe_faults(faults, _LISTED)}\n"
        "Repair, restore or remove them, or raise max_unreadable_ratio"
    )


def check_test_images(paths: Sequence[str]) -> None:
    """Refuse a test set with an image that cannot be read.

    Figures on fewer images would be figures of another test set, and an evaluation at the
    end of a run would be a late moment to fail.

    Args:
        paths: Images of the queries and galleries.

    Raises:
        BadImagesError: If there is one.
    """
    faults = list(_faults(paths).values())
    if faults:
        raise BadImagesError(
            f"{len(faults)} of {len(paths)} test images cannot be read:\n"
            f"{describe_faults(faults, _LISTED)}\n"
            "Mend or restore them: without them the figures would be of another test set"
        )


def report_unreadable(
    images: IndexedImages,
    *,
    unreported: torch.Tensor,
    unreadable: torch.Tensor,
    max_unreadable_ratio: float,
    what_happened: str,
) -> None:
    """Warn once of images that became unreadable during the run; bound their share.

    Args:
        images: The training images.
        unreported: Which failed since the last report, bool ``(M,)``, alike on all ranks.
        unreadable: Which fail still, bool ``(M,)``, alike on all ranks.
        max_unreadable_ratio: Share of all images of the run that may.
        what_happened: What was done in their place, for the warning.

    Raises:
        BadImagesError: If the share is larger.
    """  # noqa: DOC502  (raised by what this calls)
    failed = unreported | unreadable
    if not failed.any():
        return
    paths = [images.paths[i] for i in failed.nonzero().flatten().tolist()]
    faults = [fault_of(path) or f"{path}: readable again" for path in paths[:_LISTED]]
    faults += paths[_LISTED:]
    left_out = images.num_left_out
    check_unreadable_ratio(
        faults, len(images) + left_out, max_unreadable_ratio, num_unlisted=left_out
    )
    if unreported.any() and rank() == 0:
        logger.warning(
            "%d of %d training images can no longer be read; %s:\n%s",
            len(paths),
            len(images),
            what_happened,
            describe_faults(faults),
        )


def _faults(paths: Sequence[str]) -> dict[str, str]:
    """Return what cannot be read, by path; the reason is the main process's to know."""
    found = find_unreadable(paths) if rank() == 0 else {}
    if world_size() == 1:
        return found
    mask = torch.tensor([path in found for path in paths], dtype=torch.uint8)
    bad = broadcast_tensor(
        mask if rank() == 0 else None, torch.uint8, group_device()
    ).bool()
    if len(bad) != len(paths):
        raise RuntimeError(
            f"rank {rank()} lists {len(paths)} images and rank 0 {len(bad)}: give all "
            "processes the same data sets"
        )
    return {path: found.get(path, path) for path, b in zip(paths, bad, strict=True) if b}

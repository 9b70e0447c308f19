"""Detection of unreadable images before and during training, and a bound on their ratio."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from selcon_plugin.datasets.reading import describe_faults, fault_of, find_unreadable
from selcon_plugin.distributed import broadcast_tensor, group_device, rank, world_size
from selcon_plugin.engine.images import IndexedImages, Item

logger = logging.getLogger(__name__)

_LISTED = 100  # images of which a warning gives the reason
_NAMED = 5  # images that an error message names


class BadImagesError(ValueError):
    """Error for too many unreadable images; its message lists them and names a remedy."""


def readable_items(
    items: Sequence[Item], max_unreadable_ratio: float
) -> tuple[list[Item], int]:
    """Leave out unreadable images, and list them with reasons in one warning.

    The main process decodes every file once; the others use its result.

    Args:
        items: Path, identity and camera of each image.
        max_unreadable_ratio: Fraction of the images that may be left out.

    Returns:
        The readable images, sorted by path, and the number of images left out.

    Raises:
        BadImagesError: If the fraction is larger, or no image is left.
    """  # noqa: DOC502  (raised by the functions called here)
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
    """Refuse a set of images of which too many are unreadable.

    Args:
        faults: Path and reason of each unreadable image.
        num_images: Number of images in total.
        max_unreadable_ratio: Fraction of them that may be unreadable. At least one image
            must be readable in any case.
        num_unlisted: Number of unreadable images that ``faults`` does not list.
        all_read: Whether every image has been tried; otherwise there may be more faults.

    Raises:
        BadImagesError: If the fraction is larger, or no image is readable.
    """
    num_unreadable = len(faults) + num_unlisted
    if num_unreadable <= max_unreadable_ratio * num_images and num_unreadable < num_images:
        return
    raise BadImagesError(
        f"{num_unreadable} of {num_images} images{'' if all_read else ', or more,'} cannot "
        f"be read, more than the fraction of {max_unreadable_ratio:g} that "
        f"max_unreadable_ratio allows:\n{describe_faults(faults, _NAMED)}\n"
        "Repair, restore or remove them, or raise max_unreadable_ratio "
        "(--max-unreadable-ratio)"
    )


def check_test_images(paths: Sequence[str]) -> None:
    """Refuse a test set with an unreadable image.

    Metrics on fewer images would be metrics of a different test set. The check comes early,
    because otherwise the run would fail only in its final evaluation.

    Args:
        paths: Images of the queries and galleries.

    Raises:
        BadImagesError: If an image is unreadable.
    """
    faults = list(_faults(paths).values())
    if faults:
        raise BadImagesError(
            f"{len(faults)} of {len(paths)} test images cannot be read:\n"
            f"{describe_faults(faults, _NAMED)}\n"
            "Repair or restore them: without them the metrics would be of a different test "
            "set"
        )


def report_unreadable(
    images: IndexedImages,
    *,
    unreported: torch.Tensor,
    unreadable: torch.Tensor,
    max_unreadable_ratio: float,
    what_happened: str,
) -> None:
    """Warn once about images that became unreadable during the run, and bound their ratio.

    Args:
        images: Training images.
        unreported: Mask of the images that failed since the last report, bool ``(M,)``, the
            same on all ranks.
        unreadable: Mask of the images that still fail, bool ``(M,)``, the same on all
            ranks.
        max_unreadable_ratio: Fraction of all images of the run that may be unreadable.
        what_happened: How the failed images were handled, for the warning.

    Raises:
        BadImagesError: If the fraction is larger.
    """  # noqa: DOC502  (raised by the functions called here)
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
    """Return the fault of each unreadable path; only the main process has the reason."""
    found = find_unreadable(paths) if rank() == 0 else {}
    if world_size() == 1:
        return found
    mask = torch.tensor([path in found for path in paths], dtype=torch.uint8)
    failed = broadcast_tensor(
        mask if rank() == 0 else None, torch.uint8, group_device()
    ).bool()
    if len(failed) != len(paths):
        raise RuntimeError(
            f"rank {rank()} lists {len(paths)} images and rank 0 {len(failed)}: give all "
            "processes the same data sets"
        )
    return {path: found.get(path, path) for path, f in zip(paths, failed, strict=True) if f}

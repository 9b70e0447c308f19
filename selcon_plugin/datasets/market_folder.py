"""Reading of image folders with file names as in Market-1501."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from selcon_plugin.datasets.folder_files import IMAGE_SUFFIXES, is_foreign
from selcon_plugin.io.names import printable

logger = logging.getLogger(__name__)

TRAIN_FOLDER = "bounding_box_train"
QUERY_FOLDER = "query"
GALLERY_FOLDER = "bounding_box_test"

_NAME = re.compile(r"([-\d]+)_c(\d)")


class MarketSplits(NamedTuple):
    """Data set in the layout of Market-1501; each entry is ``(path, pid, camid)``.

    Attributes:
        train: Training images.
        query: Query images.
        gallery: Gallery images.
    """

    train: list[tuple[str, int, int]]
    query: list[tuple[str, int, int]]
    gallery: list[tuple[str, int, int]]


def read_market_splits(folder: str | Path) -> MarketSplits:
    """List the images of a whole data set; see :func:`read_market_folder`.

    Args:
        folder: Folder with the sub-folders ``bounding_box_train``, ``query`` and
            ``bounding_box_test``.

    Returns:
        The three splits.
    """
    folder = Path(folder)
    return MarketSplits(
        train=read_market_folder(folder / TRAIN_FOLDER),
        query=read_market_folder(folder / QUERY_FOLDER),
        gallery=read_market_folder(folder / GALLERY_FOLDER),
    )


def read_market_folder(folder: str | Path) -> list[tuple[str, int, int]]:
    """List the images of one split, sorted by file name.

    All images are listed, including junk (identity -1) and distractors (identity 0). Files
    that are not images are skipped with a warning.

    Args:
        folder: Folder of the split, such as ``bounding_box_train``.

    Returns:
        ``(path, pid, camid)`` for each image; cameras are numbered from 0.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If an image's name does not start with identity and camera, as in
            ``0002_c1s1_000451_03.jpg``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    entries: list[tuple[str, int, int]] = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if is_foreign(path.name):
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            logger.warning("%s is not an image and is skipped", printable(path))
            continue
        match = _NAME.match(path.name)
        if match is None or match[2] == "0":
            raise ValueError(
                f"{path}: expected a name like 0002_c1s1_000451_03.jpg, with the identity "
                "followed by the camera, numbered from 1"
            )
        entries.append((str(path), int(match[1]), int(match[2]) - 1))
    return entries

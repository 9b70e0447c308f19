"""Listing and reading of the images of a folder for an index."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from selcon_plugin.datasets.image_folder import (
    NO_CAMERAS,
    camera_finder,
    read_image_folder,
)
from selcon_plugin.datasets.reading import ImageReadError, read_rgb
from selcon_plugin.retrieval.store import IndexedImage

_READERS = 8


def images_below(folder: str | Path, camera_pattern: str) -> list[IndexedImage]:
    """List the images below a folder with camera, size and modification time.

    Args:
        folder: Folder, which is searched recursively.
        camera_pattern: Pattern that finds the camera in a path below the folder.

    Returns:
        The images, sorted by path.

    Raises:
        ValueError: If the pattern matches no path.
    """
    root = Path(folder).expanduser().absolute()
    find_camera = camera_finder(camera_pattern)
    images = []
    for item in read_image_folder(root, camera_pattern=NO_CAMERAS):
        camera = find_camera(Path(item.path).relative_to(root))
        try:
            status = os.stat(item.path)
        except OSError:  # a broken link, which the reader reports later
            images.append(IndexedImage(item.path, camera, 0, 0))
        else:
            images.append(
                IndexedImage(item.path, camera, status.st_size, status.st_mtime_ns)
            )
    named = [image.camera for image in images if image.camera is not None]
    if camera_pattern not in ("", NO_CAMERAS) and not named:
        raise ValueError(
            f"the camera pattern {camera_pattern!r} matches none of the {len(images)} "
            f"files, for instance not {images[0].path!r}; use none to ignore cameras"
        )
    return images


_Read = tuple[IndexedImage, Image.Image | str]


def read_ahead(images: Sequence[IndexedImage], batch_size: int) -> Iterator[list[_Read]]:
    """Decode batches in threads, one batch ahead of the one in use."""
    pending: deque[list[Future[_Read]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pending.append([pool.submit(_read, image) for image in batch])
            if len(pending) > 1:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]


def _read(image: IndexedImage) -> _Read:
    try:
        return image, read_rgb(image.path)
    except ImageReadError as error:
        return image, str(error)

"""Listing and reading of the images of a folder for an index."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from selcon_plugin.datasets.image_folder import list_folder
from selcon_plugin.datasets.reading import ImageReadError, read_rgb
from selcon_plugin.retrieval.store import IndexedImage

_READERS = 8


def images_below(folder: str | Path, camera_pattern: str) -> list[IndexedImage]:
    """List the images below a folder with camera, size and modification time.

    Args:
        folder: Folder, which is searched recursively.
        camera_pattern: As for ``selcon_plugin.datasets.read_image_folder``; a single camera
            is kept.

    Returns:
        The images, sorted by path.

    Raises:
        ValueError: If the pattern matches no path.
    """  # noqa: DOC502  (raised by the functions called here)
    root = Path(folder).expanduser().absolute()
    paths, cameras = list_folder(root, camera_pattern)
    images = []
    for path, camera in zip(paths, cameras.names, strict=True):
        try:
            status = os.stat(path)
        except OSError:  # a broken link, which the reader reports later
            images.append(IndexedImage(path, camera, 0, 0))
        else:
            images.append(IndexedImage(path, camera, status.st_size, status.st_mtime_ns))
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

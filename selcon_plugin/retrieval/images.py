"""Listing and reading of the images of a folder for an index."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from selcon_plugin.datasets.content import content_hashes
from selcon_plugin.datasets.image_folder import list_folder
from selcon_plugin.datasets.reading import ImageReadError, read_rgb
from selcon_plugin.retrieval.rows import IndexedImage

_READERS = 8


@dataclass(frozen=True)
class FoundImages:
    """Images below a folder, each file once.

    Attributes:
        root: The folder, without symbolic links.
        images: The images, sorted by path.
    """

    root: Path
    images: Sequence[IndexedImage]

    def covers(self, image: IndexedImage) -> bool:
        """Return whether an image of the index lies below the folder."""
        return _is_below(image.path, self.root) or _is_below(image.key, self.root)


def images_below(
    folder: str | os.PathLike[str], camera_pattern: str, *, progress: bool = False
) -> FoundImages:
    """List the images below a folder with camera, size, time and content.

    A folder or file that is reached by several names, such as symbolic links, is listed
    once, so that the same file never becomes two images.

    Args:
        folder: Folder, which is searched recursively.
        camera_pattern: As for ``selcon_plugin.datasets.read_image_folder``; a single camera
            is kept.
        progress: Whether to show the progress on a terminal.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it contains no image, or the pattern matches no path.
    """  # noqa: DOC502  (raised by the functions called here)
    root = Path(os.path.realpath(Path(folder).expanduser()))
    listed, cameras = list_folder(root, camera_pattern)
    contents = content_hashes(listed, progress=progress)
    real_folders: dict[str, str] = {}
    images: dict[str, IndexedImage] = {}
    for path, camera, content in zip(listed, cameras.names, contents, strict=True):
        try:
            status = os.stat(path)
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:  # a broken link, which the reader reports later
            size = changed = 0
        real = _real_path(path, real_folders)
        image = IndexedImage(
            path, camera, size, changed, content, "" if real == path else real
        )
        images.setdefault(real, image)
    return FoundImages(root, list(images.values()))


def _real_path(path: str, known: dict[str, str]) -> str:
    """Resolve symbolic links; folders are resolved once."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    if folder not in known:
        known[folder] = os.path.realpath(folder)
    return os.path.join(known[folder], name)


def _is_below(path: str, folder: Path) -> bool:
    root = os.path.join(folder, "")
    return path.startswith(root)


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

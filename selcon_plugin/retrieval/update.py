"""Update of an index by the images of a folder: what has changed, and its features."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from selcon_plugin.features import check_features
from selcon_plugin.retrieval.images import FoundImages, read_ahead
from selcon_plugin.retrieval.rows import IndexedImage, Snapshot
from selcon_plugin.retrieval.source import ImageEmbedder
from selcon_plugin.retrieval.store import Store

_IMAGES_PER_COMMIT = 4096


@dataclass
class Update:
    """Changes that an index needs to contain a folder as it is now.

    Attributes:
        to_read: Images whose features must be computed: new files, and known ones with
            another content.
        instead_of: Row of the earlier content of a file in ``to_read``, by key.
        replaced: New entry by row, for files whose feature stays.
        vanished: Rows of files that are gone.
        num_moved: How many of ``replaced`` have another path.
        num_relabeled: How many of ``replaced`` have another camera.
        num_known: Number of files that are in the index as they are.
    """

    to_read: list[IndexedImage] = field(default_factory=list)
    instead_of: dict[str, int] = field(default_factory=dict)
    replaced: dict[int, IndexedImage] = field(default_factory=dict)
    vanished: list[int] = field(default_factory=list)
    num_moved: int = 0
    num_relabeled: int = 0
    num_known: int = 0


def plan_update(state: Snapshot, found: FoundImages, *, default_cameras: bool) -> Update:
    """Compare the images below a folder with those of an index.

    Args:
        state: The index.
        found: The images.
        default_cameras: Whether cameras were found by the default rule; then a file
            without a camera keeps the one that it has in the index.

    Returns:
        The update.
    """
    rows, repeated = state.rows_by_key()
    update = Update()
    unknown: list[IndexedImage] = []
    for image in found.images:
        row = rows.pop(image.key, None)
        if row is None:
            unknown.append(image)
            continue
        if default_cameras and image.camera is None:
            image = image._replace(camera=state.images[row].camera)
        if _is_same(state.images[row], image):
            _keep(update, row, state.images[row], image)
        else:
            update.to_read.append(image)
            update.instead_of[image.key] = row
    gone = {
        row: state.images[row]
        for row in rows.values()
        if found.covers(state.images[row]) and _is_gone(state.images[row].path)
    }
    by_content = {image.content: row for row, image in gone.items() if image.content}
    for image in unknown:
        row = by_content.pop(image.content, None)
        if row is None:
            update.to_read.append(image)
        else:
            _keep(update, row, state.images[row], image)
            del gone[row]
    update.vanished = sorted((*gone, *repeated))
    update.to_read.sort()
    return update


def _is_same(before: IndexedImage, now: IndexedImage) -> bool:
    """Return whether a file has the content that it had when its feature was computed."""
    if before.content:
        return before.content == now.content
    return (before.size, before.changed) == (now.size, now.changed)


def _keep(update: Update, row: int, before: IndexedImage, now: IndexedImage) -> None:
    moved, relabeled = before.path != now.path, before.camera != now.camera
    update.num_moved += moved
    update.num_relabeled += relabeled and not moved
    update.num_known += not moved and not relabeled
    if before != now:
        update.replaced[row] = now


def _is_gone(path: str) -> bool:
    """Return whether a file that was not listed is really absent, or is left out by rule.

    A folder that cannot be read now, for instance on a drive that does not answer, says
    nothing about its files.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return True


def read_images(
    store: Store,
    update: Update,
    embedder: ImageEmbedder,
    *,
    batch_size: int,
    check: Callable[[list[str]], None],
    show_progress: bool,
) -> dict[str, str]:
    """Compute the features of the images to read, and store them.

    Args:
        store: Files of the index, locked for writing.
        update: What must be done.
        embedder: Network of the index.
        batch_size: Images computed together.
        check: Called with the faults so far after each batch.
        show_progress: Whether to show a progress bar.

    Returns:
        Path and reason of each unreadable file, by key.
    """
    faults: dict[str, str] = {}
    images: list[IndexedImage] = []
    features: list[NDArray[np.float32]] = []

    def commit() -> None:
        if images:
            rows = [update.instead_of[i.key] for i in images if i.key in update.instead_of]
            store.append(np.concatenate(features), images, instead_of=rows)
            images.clear()
            features.clear()

    total = len(update.to_read)
    with tqdm(total=total, desc="images", unit="img", disable=not show_progress) as bar:
        for batch in read_ahead(update.to_read, batch_size):
            good = [(image, pixels) for image, pixels in batch if not _is_fault(pixels)]
            faults |= {i.key: str(fault) for i, fault in batch if _is_fault(fault)}
            if good:
                rows = embedder([pixels for _, pixels in good], batch_size=batch_size)
                features.append(
                    check_features(
                        rows,
                        source="the network's output",
                        rows=len(good),
                        dim=store.manifest.dim,
                    )
                )
                images += [image for image, _ in good]
            if len(images) >= _IMAGES_PER_COMMIT:
                commit()
            bar.update(len(batch))
            check(list(faults.values()))
    commit()
    return faults


def _is_fault(read: Image.Image | str) -> bool:
    return isinstance(read, str)

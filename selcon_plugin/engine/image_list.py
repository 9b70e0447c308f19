"""The list of a run's images, stored in its folder: image i of the list is bank row i.

A resumed run uses the list that it started with. A file that has disappeared since keeps
its row, so that all others keep theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from selcon_plugin.datasets.content import MISSING
from selcon_plugin.distributed import rank
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.io.atomic import make_folder, write_atomically
from selcon_plugin.io.integrity import sealed_json, unsealed_json
from selcon_plugin.io.names import printable

IMAGE_LIST = "images.json"

logger = logging.getLogger(__name__)

_Images = TypeVar("_Images", bound=IndexedImages)


def write_image_list(folder: str | Path, images: IndexedImages) -> None:
    """Write ``images.json`` into a run's folder, on the main process.

    Args:
        folder: Folder of the run; nothing is written if the name is empty.
        images: Training images of the run. Their identities are written as well where they
            are known, so that the diagnostics of a resumed run are the same.
    """
    if not folder or rank() > 0:
        return
    columns = (
        *(images.paths, images.sizes, images.camids, images.evaluation_only_pids),
        images.hashes,
    )
    content = {
        "columns": ["path", "bytes", "camera", "identity", "content"],
        "images": list(zip(*columns, strict=True)),
        "camera_names": images.camera_names,
        "num_left_out": images.num_left_out,
    }
    file = Path(folder, IMAGE_LIST)
    make_folder(file.parent)
    write_atomically(sealed_json(content), file)


def images_to_resume_with(folder: str | Path, images: _Images) -> _Images:
    """Return the images that an interrupted run started with.

    Args:
        folder: Folder of the run.
        images: Images that exist now.

    Returns:
        The run's own list if the given images are a proper subset of it; otherwise the
        given images. If these include new ones, the checkpoint will not fit.

    Raises:
        ValueError: If files of the same name and size have another content.
    """  # noqa: DOC502  (raised by the functions called here)
    listed = _read(Path(folder, IMAGE_LIST))
    rows = [tuple(row) for row in listed.get("images", [])]
    _refuse_exchanged(rows, images)
    then = {row[:3] for row in rows}
    now = set(zip(images.paths, images.sizes, images.camids, strict=True))
    if not now < then:
        return images
    logger.warning(
        "%d of the %d images that this run started with are gone or changed; the others "
        "keep their rows: %s",
        len(then - now),
        len(then),
        ", ".join(sorted(printable(row[0]) for row in then - now)[:10]),
    )
    items = [(path, pid, camid) for path, _, camid, pid, *_ in rows]
    sizes = [row[1] for row in rows]
    hashes = [row[4] if len(row) > 4 else MISSING for row in rows]
    found = images.with_items(items, sizes, listed["num_left_out"], hashes)
    found.camera_names = listed.get("camera_names", found.camera_names)
    return found


def _refuse_exchanged(rows: Sequence[tuple[Any, ...]], images: IndexedImages) -> None:
    """Refuse images that were replaced by others of the same name and size."""
    # The folder may have been moved, but the images of a run keep their order.
    if len(rows) != len(images) or any(len(row) < 5 for row in rows):
        then = {row[0]: row[1:] for row in rows if len(row) > 4}
        then_of = [then.get(path) for path in images.paths]
    else:
        then_of = [row[1:] for row in rows]
    if not any(then_of):
        return
    exchanged = [
        path
        for path, row, size, found in zip(
            images.paths, then_of, images.sizes, images.hashes, strict=True
        )
        if row and row[0] == size and row[3] and found and row[3] != found
    ]
    if exchanged:
        shown = ", ".join(exchanged[:5]) + (", ..." if len(exchanged) > 5 else "")
        raise ValueError(
            f"cannot resume: {len(exchanged)} images have another content than when this "
            f"run started, with the same names and sizes: {shown}. Restore them, or start "
            "a new run in another folder"
        )


def _read(file: Path) -> dict[str, Any]:
    """Read the list; return an empty one if there is no valid file."""
    try:
        return unsealed_json(file.read_bytes(), file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s. The run can resume only if no image is gone", error)
        return {}

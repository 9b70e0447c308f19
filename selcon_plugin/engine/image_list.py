"""The list of a run's images, stored in its folder: image i of the list is bank row i.

A resumed run uses the list that it started with. A file that has disappeared since keeps
its row, so that all others keep theirs.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TypeVar

from selcon_plugin.distributed import rank
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.io.atomic import write_atomically

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
    columns = (images.paths, images.sizes, images.camids, images.evaluation_only_pids)
    content = {
        "columns": ["path", "bytes", "camera", "identity"],
        "images": list(zip(*columns, strict=True)),
        "num_left_out": images.num_left_out,
    }
    file = Path(folder, IMAGE_LIST)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(json.dumps(content) + "\n", file)


def images_to_resume_with(folder: str | Path, images: _Images) -> _Images:
    """Return the images that an interrupted run started with.

    Args:
        folder: Folder of the run.
        images: Images that exist now.

    Returns:
        The run's own list if the given images are a proper subset of it; otherwise the
        given images. If these include new ones, the checkpoint will not fit.
    """
    listed = _read(Path(folder, IMAGE_LIST))
    rows = [tuple(row) for row in listed.get("images", [])]
    then = {row[:3] for row in rows}
    now = set(zip(images.paths, images.sizes, images.camids, strict=True))
    if not now < then:
        return images
    logger.warning(
        "%d of the %d images that this run started with are gone or changed; the others "
        "keep their rows: %s",
        len(then - now),
        len(then),
        ", ".join(sorted(row[0] for row in then - now)[:10]),
    )
    items = [(path, pid, camid) for path, _, camid, pid in rows]
    sizes = [size for _, size, _, _ in rows]
    return images.with_items(items, sizes, listed["num_left_out"])


def _read(file: Path) -> dict[str, Any]:
    """Read the list; return an empty one if there is no valid file."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

"""Synthetic multi-camera data set of persons, rendered on demand.

The data set is rendered from a seed, so nothing has to be downloaded and the images are
reproducible. It has the layout and the file names of Market-1501, so any reader of that
data set can read it.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from selcon_plugin.datasets.market_folder import (
    GALLERY_FOLDER,
    QUERY_FOLDER,
    TRAIN_FOLDER,
)
from selcon_plugin.datasets.synthetic.cameras import (
    MAX_CAMERAS,
    jpeg_quality,
    make_track,
    take_picture,
)
from selcon_plugin.datasets.synthetic.looks import FAMILY_SIZE, make_look
from selcon_plugin.io.atomic_folder import publish_folder

logger = logging.getLogger(__name__)

_VERSION = 1  # must be incremented by any change that alters the images
_MANIFEST = "manifest.json"
_SHOT_STREAM = 3  # separates this random stream from those of the other modules
_MAX_PID = 9999  # largest number with four digits
_DISTRACTOR_FAMILY = 100_000  # larger than the families of all identities

_LEGAL_RANGES = {
    "num_train_ids": (1, _MAX_PID),
    "num_test_ids": (1, _MAX_PID),
    "images_per_id": (2, 1000),
    "num_cameras": (2, MAX_CAMERAS),
    "num_distractors": (0, 100_000),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class SyntheticPersonsSpec:
    """Specification of the data set; equal specifications give identical files.

    Attributes:
        num_train_ids: Number of training identities.
        num_test_ids: Number of test identities, disjoint from the training identities.
        images_per_id: Images per identity, from at least two cameras.
        num_cameras: Number of cameras. Some readers of Market-1501 allow 6 at most.
        num_distractors: Distractor images in the gallery (identity 0).
        seed: Random seed of the data set.

    Raises:
        ValueError: If a value is outside its legal range.
    """

    num_train_ids: int = 100
    num_test_ids: int = 90
    images_per_id: int = 10
    num_cameras: int = 6
    num_distractors: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (lowest, highest) in _LEGAL_RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not lowest <= value <= highest:
                raise ValueError(
                    f"{name} must be an integer in [{lowest}, {highest}], got {value!r}"
                )
        if self.num_train_ids + self.num_test_ids > _MAX_PID:
            raise ValueError(
                f"num_train_ids + num_test_ids must be at most {_MAX_PID}, "
                f"got {self.num_train_ids} + {self.num_test_ids}"
            )

    @property
    def num_train_images(self) -> int:
        """Number of training images."""
        return self.num_train_ids * self.images_per_id

    @property
    def num_test_images(self) -> int:
        """Number of query and gallery images."""
        return self.num_test_ids * self.images_per_id + self.num_distractors

    @property
    def folder_name(self) -> str:
        """Name of the data folder, unique for each specification."""
        text = json.dumps(_manifest_head(self), sort_keys=True)
        return f"synthetic_persons-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class _Shot:
    """Image to be rendered."""

    folder: str
    pid: int
    camera: int
    number: int  # of this image among those of its person
    distractor: int = 0  # distinguishes the distractors, which all have pid 0

    @property
    def file_name(self) -> str:
        frame = 25 * (self.number + 1) + 7 * self.distractor
        sequence = 1 + self.distractor % 6
        return f"{self.pid:04d}_c{self.camera + 1}s{sequence}_{frame:06d}_{1:02d}.jpg"


def generate_synthetic_persons(
    root: str | Path,
    spec: SyntheticPersonsSpec = SyntheticPersonsSpec(),
    *,
    num_workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Return the folder with the synthetic persons, rendering them first if necessary.

    The folder below `root` is named after a hash of the specification and appears only
    when it is complete. An existing folder is reused. Concurrent processes get the same
    folder, which is rendered once.

    Args:
        root: Root folder of the data sets; created if missing.
        spec: Specification of the data set.
        num_workers: Number of rendering processes; `None` and 1 render in this process.
            More than 1 starts new interpreters, so a script needs
            ``if __name__ == "__main__":``. The images do not depend on it.
        progress: Whether to show a progress bar.

    Returns:
        The folder with ``bounding_box_train``, ``query`` and ``bounding_box_test``.

    Raises:
        ValueError: If `num_workers` is not positive.
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1 or None, got {num_workers!r}")
    return publish_folder(
        Path(root) / spec.folder_name,
        fill=functools.partial(
            _fill, spec=spec, num_workers=num_workers or 1, progress=progress
        ),
        is_complete=functools.partial(_is_complete, spec=spec),
    )


def _manifest_head(spec: SyntheticPersonsSpec) -> dict[str, Any]:
    """Return the manifest entries that identify a data set."""
    return {"generator_version": _VERSION, "spec": dataclasses.asdict(spec)}


def _is_complete(folder: Path, spec: SyntheticPersonsSpec) -> bool:
    """Return whether a folder holds all images of this specification."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        head = {key: manifest[key] for key in _manifest_head(spec)}
        counts = dict(manifest["num_images"])
        found = {name: len(list((folder / name).glob("*.jpg"))) for name in counts}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return head == _manifest_head(spec) and found == counts and sum(counts.values()) > 0


def _fill(
    folder: Path, spec: SyntheticPersonsSpec, num_workers: int, progress: bool
) -> None:
    """Render all images into an empty folder and write the manifest last."""
    logger.info("rendering synthetic persons into %s", folder.parent)
    groups = _plan(spec)
    counts = dict.fromkeys((TRAIN_FOLDER, QUERY_FOLDER, GALLERY_FOLDER), 0)
    for name in counts:
        (folder / name).mkdir()
    for shot in (shot for group in groups for shot in group):
        counts[shot.folder] += 1
    done = _render_groups(folder, spec, groups, num_workers)
    for _ in _with_progress(done, len(groups)) if progress else done:
        pass
    manifest = {**_manifest_head(spec), "num_images": counts}
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def _with_progress(done: Iterable[None], total: int) -> Iterable[None]:
    """Show a progress bar while groups are rendered."""
    bar: Iterable[None] = tqdm(done, total=total, desc="synthetic persons", unit="person")
    return bar


def _render_groups(
    folder: Path, spec: SyntheticPersonsSpec, groups: list[list[_Shot]], num_workers: int
) -> Iterator[None]:
    """Render the groups, in this process or in others."""
    render = functools.partial(_render_group, folder, spec)
    if num_workers == 1:
        yield from map(render, groups)
        return
    context = multiprocessing.get_context("spawn")  # forking is unsafe with threads
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield from pool.map(render, groups, chunksize=4)


def _render_group(folder: Path, spec: SyntheticPersonsSpec, shots: list[_Shot]) -> None:
    """Render the images of one person."""
    for shot in shots:
        if shot.pid:
            family, member = divmod(shot.pid, FAMILY_SIZE)
        else:
            family, member = _DISTRACTOR_FAMILY + shot.distractor, 0
        look = make_look(spec.seed, family, member)
        key = [spec.seed, _SHOT_STREAM, shot.pid, shot.distractor, shot.camera]
        track = make_track(shot.camera, np.random.default_rng(key))
        rng = np.random.default_rng([*key, shot.number + 1])
        picture = take_picture(look, shot.camera, track, spec.seed, rng)
        picture.save(
            folder / shot.folder / shot.file_name, quality=jpeg_quality(shot.camera)
        )


def _plan(spec: SyntheticPersonsSpec) -> list[list[_Shot]]:
    """List the images to render, one group per person."""
    groups = []
    for pid in range(1, spec.num_train_ids + spec.num_test_ids + 1):
        cameras = _cameras_of(spec, pid)
        if pid <= spec.num_train_ids:
            folders = [TRAIN_FOLDER] * len(cameras)
        else:
            folders = _split_query(cameras)
        groups.append(
            [
                _Shot(folder, pid, camera, number)
                for number, (folder, camera) in enumerate(
                    zip(folders, cameras, strict=True)
                )
            ]
        )
    groups.extend(
        [_Shot(GALLERY_FOLDER, 0, distractor % spec.num_cameras, 0, distractor)]
        for distractor in range(spec.num_distractors)
    )
    return groups


def _cameras_of(spec: SyntheticPersonsSpec, pid: int) -> list[int]:
    """Choose the camera of each image of a person: at least two cameras, alternating."""
    rng = np.random.default_rng([spec.seed, _SHOT_STREAM, pid])
    most = min(spec.num_cameras, spec.images_per_id)
    num_seen = int(rng.integers(min(4, most), most + 1))
    seen = rng.permutation(spec.num_cameras)[:num_seen]
    return [int(seen[number % num_seen]) for number in range(spec.images_per_id)]


def _split_query(cameras: list[int]) -> list[str]:
    """Make one image per camera a query, if its camera has another image."""
    # Every camera keeps an image in the gallery, so each query has a match from another
    # camera. If no camera has two images, the first image is the only query.
    folders = [GALLERY_FOLDER] * len(cameras)
    for number, camera in enumerate(cameras):
        if camera in cameras[number + 1 :] and camera not in cameras[:number]:
            folders[number] = QUERY_FOLDER
    if QUERY_FOLDER not in folders:
        folders[0] = QUERY_FOLDER
    return folders

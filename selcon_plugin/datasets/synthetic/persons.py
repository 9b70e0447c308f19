"""Synthetic people under several cameras: data to try training on, drawn on demand.

The data set is drawn from a seed, so nothing has to be downloaded and everybody has the
same pictures. It has the layout and the file names of Market-1501 and can be read by
whatever reads that.
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

_VERSION = 1  # to be raised whenever a change alters the pictures
_MANIFEST = "manifest.json"
_SHOT_STREAM = 3  # keeps these draws apart from those of the other modules
_MAX_PID = 9999  # what four digits hold
_DISTRACTOR_FAMILY = 100_000  # beyond the families of all identities

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
    """What to draw: equal specifications give equal bytes.

    Attributes:
        num_train_ids: Number of people to train on.
        num_test_ids: Number of people to test on, none of them in training.
        images_per_id: Pictures of each person, over at least two cameras.
        num_cameras: Number of cameras. Some readers of Market-1501 allow 6 at most.
        num_distractors: Pictures in the gallery of people without an identity (0).
        seed: Seed of everything drawn.

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
                    f"{name} must be a whole number in [{lowest}, {highest}], got {value!r}"
                )
        if self.num_train_ids + self.num_test_ids > _MAX_PID:
            raise ValueError(
                f"num_train_ids + num_test_ids must be at most {_MAX_PID}, "
                f"got {self.num_train_ids} + {self.num_test_ids}"
            )

    @property
    def num_train_images(self) -> int:
        """Number of pictures to train on."""
        return self.num_train_ids * self.images_per_id

    @property
    def num_test_images(self) -> int:
        """Number of pictures in query and gallery together."""
        return self.num_test_ids * self.images_per_id + self.num_distractors

    @property
    def folder_name(self) -> str:
        """Name of the data folder; no two specifications share one."""
        text = json.dumps(_manifest_head(self), sort_keys=True)
        return f"synthetic_persons-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class _Shot:
    """One picture to be taken."""

    folder: str
    pid: int
    camera: int
    number: int  # of this picture among those of its person
    stranger: int = 0  # tells the distractors apart, who all have pid 0

    @property
    def file_name(self) -> str:
        frame = 25 * (self.number + 1) + 7 * self.stranger
        sequence = 1 + self.stranger % 6
        return f"{self.pid:04d}_c{self.camera + 1}s{sequence}_{frame:06d}_{1:02d}.jpg"


def generate_synthetic_persons(
    root: str | Path,
    spec: SyntheticPersonsSpec = SyntheticPersonsSpec(),
    *,
    num_workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Return the folder with the synthetic people, drawing them first if need be.

    The folder below `root` is named after a hash of the specification and appears only
    when it is complete. If it is there already, nothing is drawn. Processes that ask at
    the same time get the same folder, drawn once.

    Args:
        root: Folder below which data sets lie; created if absent.
        spec: What to draw.
        num_workers: Processes to draw with; `None` and 1 draw in this process. More than
            1 starts fresh interpreters, so a script needs its
            ``if __name__ == "__main__":``. The pictures do not depend on it.
        progress: Whether to show a progress bar.

    Returns:
        The folder that holds ``bounding_box_train``, ``query`` and ``bounding_box_test``.

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
    """Return what identifies a data set."""
    return {"generator_version": _VERSION, "spec": dataclasses.asdict(spec)}


def _is_complete(folder: Path, spec: SyntheticPersonsSpec) -> bool:
    """Tell whether a folder holds all pictures of this specification."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        head = {key: manifest[key] for key in _manifest_head(spec)}
        counts = dict(manifest["num_images"])
        found = {name: len(list((folder / name).glob("*.jpg"))) for name in counts}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return head == _manifest_head(spec) and found == counts and sum(counts.values()) > 0


def _fill(
    folder: Path, spec: SyntheticPersonsSpec, num_workers: int, progress: bool
) -> None:
    """Draw all pictures into an empty folder and write the manifest last."""
    logger.info("drawing synthetic people into %s", folder.parent)
    groups = _plan(spec)
    counts = dict.fromkeys((TRAIN_FOLDER, QUERY_FOLDER, GALLERY_FOLDER), 0)
    for name in counts:
        (folder / name).mkdir()
    for shot in (shot for group in groups for shot in group):
        counts[shot.folder] += 1
    done = _draw_groups(folder, spec, groups, num_workers)
    for _ in _with_progress(done, len(groups)) if progress else done:
        pass
    manifest = {**_manifest_head(spec), "num_images": counts}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _with_progress(done: Iterable[None], total: int) -> Iterable[None]:
    """Show a bar while groups are being drawn."""
    bar: Iterable[None] = tqdm(done, total=total, desc="synthetic people", unit="person")
    return bar


def _draw_groups(
    folder: Path, spec: SyntheticPersonsSpec, groups: list[list[_Shot]], num_workers: int
) -> Iterator[None]:
    """Draw group after group, here or in other processes."""
    draw = functools.partial(_draw_group, folder, spec)
    if num_workers == 1:
        yield from map(draw, groups)
        return
    context = multiprocessing.get_context("spawn")  # forking is unsafe among threads
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield from pool.map(draw, groups, chunksize=4)


def _draw_group(folder: Path, spec: SyntheticPersonsSpec, shots: list[_Shot]) -> None:
    """Draw the pictures of one person."""
    for shot in shots:
        if shot.pid:
            family, member = divmod(shot.pid, FAMILY_SIZE)
        else:
            family, member = _DISTRACTOR_FAMILY + shot.stranger, 0
        look = make_look(spec.seed, family, member)
        who = [spec.seed, _SHOT_STREAM, shot.pid, shot.stranger, shot.camera]
        track = make_track(shot.camera, np.random.default_rng(who))
        rng = np.random.default_rng([*who, shot.number + 1])
        picture = take_picture(look, shot.camera, track, spec.seed, rng)
        picture.save(
            folder / shot.folder / shot.file_name, quality=jpeg_quality(shot.camera)
        )


def _plan(spec: SyntheticPersonsSpec) -> list[list[_Shot]]:
    """List the pictures to take, one group per person."""
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
        [_Shot(GALLERY_FOLDER, 0, stranger % spec.num_cameras, 0, stranger)]
        for stranger in range(spec.num_distractors)
    )
    return groups


def _cameras_of(spec: SyntheticPersonsSpec, pid: int) -> list[int]:
    """Choose the camera of each picture of a person: two cameras at least, in turn."""
    rng = np.random.default_rng([spec.seed, _SHOT_STREAM, pid])
    most = min(spec.num_cameras, spec.images_per_id)
    num_seen = int(rng.integers(min(4, most), most + 1))
    seen = rng.permutation(spec.num_cameras)[:num_seen]
    return [int(seen[number % num_seen]) for number in range(spec.images_per_id)]


def _split_query(cameras: list[int]) -> list[str]:
    """Make one picture per camera a query, as long as its camera keeps another one."""
    # Every camera keeps a picture in the gallery, so each query has a match from another
    # camera. If no camera has two pictures, the first picture is the only query.
    folders = [GALLERY_FOLDER] * len(cameras)
    for number, camera in enumerate(cameras):
        if camera in cameras[number + 1 :] and camera not in cameras[:number]:
            folders[number] = QUERY_FOLDER
    if QUERY_FOLDER not in folders:
        folders[0] = QUERY_FOLDER
    return folders

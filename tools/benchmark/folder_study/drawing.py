"""Folders drawn from the images of a data set with known identities.

A folder is a list of rows of a pool: the images of one part of Market-1501, or synthetic
persons. Folders for choosing settings come from the training identities of Market-1501,
those for reporting from its test identities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_NAME = re.compile(r"(-?\d+)_c(\d+)(?:s(\d+))?_(\d+)")
_JUNK, _DISTRACTOR = -1, 0  # Market-1501's names for them
_TRACK_LENGTH, _MOST_TRACKS = 8, 3
MIXED = 0
_MIXED_MEDIAN, _MIXED_SPREAD, _MIXED_MOST = 5.0, 0.9, 50

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class FolderSpec:
    """A kind of folder.

    Attributes:
        people: Number of persons with at least two images.
        images: Images per person; :data:`MIXED` for a log-normal number of 2 to 50.
        cameras: Number of cameras: 1, 2 or 6; 0 for six that are not known.
        singles: Persons seen once, as a fraction of all persons (mixed folders), or
            distractors as a fraction of the images.
        uneven: Whether each camera has a quarter of the images of the next larger one.
        tracks: Whether the images of a person are one to three tracks of consecutive
            frames.
    """

    people: int
    images: int
    cameras: int = 6
    singles: float = 0.0
    uneven: bool = False
    tracks: bool = False

    @property
    def name(self) -> str:
        """Describe the folder, for instance ``150 x 4, 2 cameras``."""
        each = str(self.images) if self.images else "mixed"
        cameras = f"{self.cameras} camera{'s' * (self.cameras > 1)}"
        parts = [
            f"{self.people} x {each}",
            cameras if self.cameras else "no cameras",
            f"{self.singles:.0%} once" if self.singles else "",
            "uneven" if self.uneven else "",
            "tracks" if self.tracks else "",
        ]
        return ", ".join(part for part in parts if part)


SPECS: tuple[FolderSpec, ...] = (
    FolderSpec(20, 2, 2),
    FolderSpec(20, 4, 1),
    FolderSpec(20, 8),
    FolderSpec(20, 17, 0),
    FolderSpec(20, 40),
    FolderSpec(20, MIXED, 2, 0.3),
    FolderSpec(150, 2, 2),
    FolderSpec(150, 2, 0),
    FolderSpec(150, 3, 2),
    FolderSpec(150, 4, 0),
    FolderSpec(150, 4, 1),
    FolderSpec(150, 8),
    FolderSpec(150, 8, 0, 0.3),
    FolderSpec(150, 17),
    FolderSpec(40, 40),
    FolderSpec(150, MIXED, 6, 0.3),
    FolderSpec(500, 2),
    FolderSpec(500, 4, 2),
    FolderSpec(500, 4, 0),
    FolderSpec(500, 8),
    FolderSpec(500, 17),
    FolderSpec(500, MIXED, 0, 0.3),
    FolderSpec(300, 4, 2, uneven=True),
    FolderSpec(150, 12, tracks=True),
)


@dataclass(frozen=True, eq=False)
class Pool:
    """Images with known identities, from which folders are sampled.

    Attributes:
        names: File name of each image.
        features: Unit vectors, float32 ``(M, C)``.
        identities: Person of each image, ``(M,)``; 0 for persons without a number.
        cameras: Camera of each image, 0, 1, ..., ``(M,)``.
        frames: Position of each image within its camera's recording, ``(M,)``.
    """

    names: Sequence[str]
    features: NDArray[np.float32]
    identities: Numbers
    cameras: Numbers
    frames: Numbers

    @classmethod
    def read(cls, files: Sequence[Path]) -> Pool:
        """Read features that ``selcon extract`` wrote; junk images are left out.

        Args:
            files: Files of features of images that are named as in Market-1501.

        Returns:
            The pool.

        Raises:
            ValueError: If a file name is not of that form.
        """
        names: list[str] = []
        features = []
        for file in files:
            with np.load(file) as content:
                names += [Path(path).name for path in content["paths"]]
                features.append(content["features"])
        found = [_NAME.match(name) for name in names]
        for name, match in zip(names, found, strict=True):
            if match is None:
                raise ValueError(
                    f"{name} names no person and camera as 0002_c1s1_000451 does"
                )
        rows = np.array([[int(part or 0) for part in m.groups()] for m in found if m])
        kept = rows[:, 0] != _JUNK
        vectors = np.concatenate(features)[kept]
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return cls(
            [name for name, good in zip(names, kept, strict=True) if good],
            vectors.astype(np.float32),
            rows[kept, 0],
            rows[kept, 1] - 1,
            rows[kept, 2] * 10**7 + rows[kept, 3],
        )


@dataclass(frozen=True, eq=False)
class Folder:
    """Images of a folder.

    Attributes:
        rows: Row of each image in the pool, in the order of the file names, ``(M,)``.
        identities: Person of each image, 0, 1, ..., ``(M,)``; a distractor is a person of
            its own.
        camids: Camera of each image, ``(M,)``; -1 if unknown.
    """

    rows: Numbers
    identities: Numbers
    camids: Numbers


def draw(pool: Pool, spec: FolderSpec, seed: int) -> Folder:
    """Draw a folder.

    Persons with fewer images than asked for are taken if no others are left: the number of
    images per person is then smaller on average.

    Args:
        pool: Images to draw from.
        spec: Kind of folder.
        seed: Seed; the same folder for the same pool, kind and seed.

    Returns:
        The folder.
    """
    random = np.random.default_rng(seed)
    cameras = _cameras(pool, spec, random)
    usable = np.isin(pool.cameras, cameras) & (pool.identities != _DISTRACTOR)
    counts = np.bincount(pool.identities[usable])
    people = random.permutation(np.flatnonzero(counts >= 2))
    if spec.images >= 17:
        # Few persons have as many images.
        people = people[np.argsort(-np.minimum(counts[people], spec.images), kind="stable")]
    wanted = _images_per_person(spec, random)
    weight = random.permutation(4.0 ** -np.arange(pool.cameras.max() + 1))
    left = list(people)
    rows, identities = [], []
    for number in wanted:
        person = next((p for p in left if counts[p] >= number), left[0] if left else None)
        if person is None:
            break
        left.remove(person)
        images = np.flatnonzero(usable & (pool.identities == person))
        if spec.tracks:
            images = _tracks(pool, images, random)
        else:
            score = _camera_ranks(pool.cameras[images], random)
            if spec.uneven:
                score = random.random(len(images)) / weight[pool.cameras[images]]
            images = images[np.argsort(score, kind="stable")][:number]
        rows.append(images)
        identities.append(np.full(len(images), person))
    chosen, persons = np.concatenate(rows), np.concatenate(identities)
    once = _singles(pool, spec, cameras, left, len(chosen), random)
    chosen = np.concatenate([chosen, once])
    persons = np.concatenate([persons, counts.size + np.arange(len(once))])
    # A folder is read in the order of its names, which says nothing of the persons here.
    order = np.lexsort((pool.frames[chosen], pool.cameras[chosen]))
    chosen, persons = chosen[order], persons[order]
    camids = pool.cameras[chosen] if spec.cameras else np.full(len(chosen), -1)
    return Folder(chosen, np.unique(persons, return_inverse=True)[1], camids)


def _cameras(pool: Pool, spec: FolderSpec, random: np.random.Generator) -> Numbers:
    known = np.unique(pool.cameras)
    if spec.cameras in (0, len(known)):
        return known
    # Two cameras that many persons pass: otherwise few persons can be sampled.
    counts = np.bincount(pool.cameras[pool.identities != _DISTRACTOR])
    most = np.argsort(-counts, kind="stable")[: max(3, spec.cameras)]
    return random.permutation(most)[: spec.cameras]


def _images_per_person(spec: FolderSpec, random: np.random.Generator) -> list[int]:
    if spec.images != MIXED:
        return [spec.images] * spec.people
    drawn = random.lognormal(np.log(_MIXED_MEDIAN), _MIXED_SPREAD, spec.people)
    return sorted((int(n) for n in drawn.round().clip(2, _MIXED_MOST)), reverse=True)


def _camera_ranks(cameras: Numbers, random: np.random.Generator) -> NDArray[np.float64]:
    """Return a score by which the cameras of a person take turns, not strictly."""
    rank = np.empty(len(cameras))
    order = random.permutation(len(cameras))
    for camera in np.unique(cameras):
        seen = order[cameras[order] == camera]
        rank[seen] = np.arange(len(seen))
    return rank + 2 * random.random(len(cameras))


def _tracks(pool: Pool, images: Numbers, random: np.random.Generator) -> Numbers:
    order = images[np.lexsort((pool.frames[images], pool.cameras[images]))]
    cameras = random.permutation(np.unique(pool.cameras[order]))
    seen = cameras[: random.integers(1, _MOST_TRACKS + 1)]
    return np.concatenate([order[pool.cameras[order] == c][:_TRACK_LENGTH] for c in seen])


def _singles(
    pool: Pool,
    spec: FolderSpec,
    cameras: Numbers,
    left: Sequence[int],
    num_images: int,
    random: np.random.Generator,
) -> Numbers:
    """Choose images of persons who are seen once."""
    if spec.images == MIXED:
        count = round(spec.people * spec.singles / (1 - spec.singles))
    else:
        count = round(num_images * spec.singles)
    usable = np.isin(pool.cameras, cameras)
    distractors = random.permutation(
        np.flatnonzero(usable & (pool.identities == _DISTRACTOR))
    )[:count]
    others = [
        random.choice(np.flatnonzero(usable & (pool.identities == person)))
        for person in left[: count - len(distractors)]
    ]
    return np.concatenate([distractors, np.array(others, dtype=np.int64)]).astype(np.int64)

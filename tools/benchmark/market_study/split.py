"""Validation split of Market-1501: held-out training identities for model selection.

The official test images are only for the final results. Settings are chosen on identities
that are excluded from the training: their images become a query and a gallery set. The
result is a data set of links in the layout of FastReID's ``Market1501``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DATASET_FOLDER = "Market-1501-v15.09.15"
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"

_RECORD = "split.json"
_NAME = re.compile(r"(-?\d+)_c(\d+)")


@dataclass(frozen=True)
class Split:
    """File names of the images in each part of a split.

    Attributes:
        train: Training images.
        query: Images of held-out identities, one for each of their cameras.
        gallery: Other images of the held-out identities.
    """

    train: tuple[str, ...]
    query: tuple[str, ...]
    gallery: tuple[str, ...]

    def counts(self) -> str:
        """Describe the numbers of images and identities."""
        return (
            f"{len(self.train)} training images of {len(_identities(self.train))} "
            f"identities; {len(self.query)} queries and {len(self.gallery)} gallery images "
            f"of {len(_identities(self.gallery))} others"
        )


def hold_out(
    names: Iterable[str],
    *,
    num_validation: int = 100,
    num_train: int = 0,
    seed: int = 0,
) -> Split:
    """Hold identities out of the training images.

    A query is sampled for each camera with at least two images of a held-out identity, if
    other cameras show it too: each query has a match from another camera, as in the
    official test set.

    Args:
        names: File names that start with identity and camera, such as
            ``0002_c1s1_000451_03.jpg``.
        num_validation: Number of identities to hold out.
        num_train: Number of training identities, sampled from the others; 0 for all.
        seed: Seed of the identities and queries.

    Returns:
        The split, the same for the same names on every machine; each part is sorted.

    Raises:
        ValueError: If there are too few identities, or a name cannot be read.

    Example:
        >>> names = ["0001_c1_0.jpg", "0001_c1_1.jpg", "0001_c2_2.jpg", "0002_c1_3.jpg"]
        >>> split = hold_out(names, num_validation=1)
        >>> len(split.train) + len(split.query) + len(split.gallery)
        4
    """
    names = sorted(names)
    identities = _shuffled(sorted(_identities(names)), seed)
    if not 0 < num_validation < len(identities):
        raise ValueError(
            f"cannot hold out {num_validation} of {len(identities)} identities: both parts "
            "need at least one"
        )
    held_out, rest = set(identities[:num_validation]), identities[num_validation:]
    if num_train > len(rest):
        raise ValueError(
            f"cannot train on {num_train} identities: {len(rest)} of {len(identities)} "
            f"remain when {num_validation} are held out"
        )
    kept = set(rest[:num_train] if num_train else rest)
    validation = [name for name in names if _identity(name) in held_out]
    query = _queries(validation, seed)
    return Split(
        train=tuple(name for name in names if _identity(name) in kept),
        query=tuple(sorted(query)),
        gallery=tuple(name for name in validation if name not in query),
    )


def _queries(names: Sequence[str], seed: int) -> set[str]:
    by_camera: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        identity, camera = _read_name(name)
        by_camera[identity][camera].append(name)
    return {
        _shuffled(files, seed)[0]
        for cameras in by_camera.values()
        if len(cameras) > 1
        for files in cameras.values()
        if len(files) > 1
    }


def _read_name(name: str) -> tuple[str, str]:
    found = _NAME.match(name)
    if found is None:
        raise ValueError(f"{name!r} does not start with identity and camera, like 0002_c1")
    return found[1], found[2]


def _identity(name: str) -> str:
    return _read_name(name)[0]


def _identities(names: Iterable[str]) -> set[str]:
    return {_identity(name) for name in names}


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Sort names by a hash, which does not depend on the version of Python or NumPy."""
    return sorted(names, key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).digest())


def official_folder(data: Path) -> Path:
    """Find Market-1501 below a root of data sets.

    Args:
        data: Root folder, as in ``FASTREID_DATASETS``.

    Returns:
        The folder that contains ``bounding_box_train``.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = data / DATASET_FOLDER
    if not (folder / TRAIN).is_dir():
        raise FileNotFoundError(
            f"there is no {folder / TRAIN}: --data must be the folder that contains "
            f"{DATASET_FOLDER}"
        )
    return folder


def has_official_test(data: Path) -> bool:
    """Return whether query and gallery of the official test set exist."""
    return all((data / DATASET_FOLDER / part).is_dir() for part in (QUERY, GALLERY))


def make_split(
    data: Path, root: Path, *, num_validation: int, num_train: int, seed: int
) -> Split:
    """Create the data set of a split, or read an existing one.

    Args:
        data: Root folder that contains Market-1501.
        root: Root folder of the new data set, which consists of links.
        num_validation: Number of identities to hold out.
        num_train: Number of training identities; 0 for all others.
        seed: Seed of the split.

    Returns:
        The split.

    Raises:
        ValueError: If there is a data set with different settings.
    """
    asked = {"num_validation": num_validation, "num_train": num_train, "seed": seed}
    record = root / _RECORD
    if record.is_file():
        earlier = json.loads(record.read_text())
        if earlier["asked"] != asked:
            raise ValueError(
                f"{root} holds a split with other settings ({earlier['asked']}, now "
                f"{asked}): choose another --output"
            )
        return Split(*(tuple(earlier[part]) for part in ("train", "query", "gallery")))
    source = official_folder(data).resolve() / TRAIN
    split = hold_out(
        (file.name for file in source.glob("*.jpg")),
        num_validation=num_validation,
        num_train=num_train,
        seed=seed,
    )
    parts = {TRAIN: split.train, QUERY: split.query, GALLERY: split.gallery}
    links = {part: [source / name for name in names] for part, names in parts.items()}
    _link(links, root, {"asked": asked, **asdict(split)})
    return split


def make_official(data: Path, root: Path, train: Sequence[str]) -> None:
    """Create a data set of some training images and the complete official test set.

    Args:
        data: Root folder that contains Market-1501.
        root: Root folder of the new data set of links; an existing one is kept.
        train: Names of the training images.

    Raises:
        ValueError: If there is a data set with different training images.
    """
    record = root / _RECORD
    if record.is_file():
        if json.loads(record.read_text())["train"] != list(train):
            raise ValueError(
                f"{root} holds other training images than requested: choose another "
                "--output"
            )
        return
    source = official_folder(data).resolve()
    links = {TRAIN: [source / TRAIN / name for name in train]}
    for part in (QUERY, GALLERY):
        links[part] = sorted((source / part).glob("*.jpg"))
    _link(links, root, {"train": list(train)})


def _link(links: Mapping[str, Sequence[Path]], root: Path, record: object) -> None:
    # Renamed when complete, so an incomplete data set is created again.
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part, files in links.items():
        folder = partial / DATASET_FOLDER / part
        folder.mkdir(parents=True)
        for file in files:
            (folder / file.name).symlink_to(file)
    (partial / _RECORD).write_text(f"{json.dumps(record, indent=1)}\n")
    partial.rename(root)

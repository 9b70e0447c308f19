"""The door where identities are dropped: images in a fixed order, each its own label."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from selcon_plugin.datasets import read_image_folder
from selcon_plugin.samplers import SampleKey

UNKNOWN = -1

# Path, identity, camera; names or numbers, UNKNOWN where not known.
Item = tuple[str, Any, Any]


def extra_items(folder: str) -> list[Item]:
    """List a folder of images that join the training set, such as generated ones.

    Args:
        folder: Any folder of images; empty for none.

    Returns:
        Its images, of unknown identity and camera.

    Raises:
        ValueError: If it has no image. ``FileNotFoundError`` if it does not exist.
    """  # noqa: DOC502  (raised under another name)
    if not folder:
        return []
    try:
        images = read_image_folder(folder, camera_pattern="none")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"EXTRA_IMAGES: {error}") from error
    return [(image.path, UNKNOWN, UNKNOWN) for image in images]


class IndexedImages(Dataset[dict[str, Any]]):
    """Images whose only label is their own index.

    Images are sorted by path, so that row i of a memory bank is the same image whatever
    order the file system lists them in. Random augmentation is seeded by the sample's place
    in the stream. What a sample looks like is the adapter's: it overrides :meth:`sample`.

    Args:
        items: Path, identity and camera of each image.
        read: Makes an image of a path.
        transform: Makes what the network takes of an image.
        seed: Seed of the augmentation.

    Attributes:
        paths: Path of each image.
        camids: Camera of each image as 0, 1, ...; -1 where unknown.
        true_pids: Identity of each image as 0, 1, ...; -1 where unknown. For diagnostics
            only; no sample carries it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        read: Callable[[str], Any],
        transform: Callable[[Any], Any] | None,
        seed: int = 0,
    ) -> None:
        items = sorted(items, key=lambda item: item[0])
        self.paths = [item[0] for item in items]
        self.true_pids = _enumerate_names([item[1] for item in items])
        self.camids = _enumerate_names([item[2] for item in items])
        self.read = read
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_cameras(self) -> int:
        """Number of known cameras."""
        return len(set(self.camids) - {UNKNOWN})

    @property
    def camera_ids(self) -> Tensor:
        """Camera of each image, int64 ``(M,)``, -1 where unknown."""
        return torch.tensor(self.camids, dtype=torch.int64)

    @property
    def known_pids(self) -> Tensor | None:
        """Identity of each image, int64 ``(M,)``, for diagnostics.

        None where identities say nothing: some are not known, all images have one, or each
        its own.
        """
        if UNKNOWN in self.true_pids or not 1 < len(set(self.true_pids)) < len(self):
            return None
        return torch.tensor(self.true_pids)

    @property
    def fingerprint(self) -> str:
        """Short hash of names, sizes and cameras: tells if two lists are the same."""
        digest = hashlib.sha256()
        for path, camid in zip(self.paths, self.camids, strict=True):
            size = os.path.getsize(path)
            digest.update(f"{PurePath(path).name}\0{size}\0{camid}\n".encode())
        return digest.hexdigest()[:16]

    def with_transform(self, transform: Callable[[Any], Any]) -> IndexedImages:
        """Return the same images in the same order under another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def sample(self, index: int, image: Any) -> dict[str, Any]:
        """Make the sample that the adapter's loader expects.

        Args:
            index: Which image it is.
            image: What the transform made of it.

        Returns:
            Values by name.
        """
        raise NotImplementedError

    def image_of(self, sample: dict[str, Any]) -> Tensor:
        """Return the image in what :meth:`sample` made.

        Args:
            sample: A sample.

        Returns:
            Shape ``(3, h, w)``.
        """
        raise NotImplementedError

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        if not isinstance(key, SampleKey):
            key = SampleKey(key, key)
        image = self.read(self.paths[key.index])
        if get_worker_info() is not None:
            return self.sample(key.index, self._augment(image, key.position))
        # The seed is set in the training process itself: leave its streams as they were.
        with torch.random.fork_rng(devices=[]):
            python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
            image = self._augment(image, key.position)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
        return self.sample(key.index, image)

    def _augment(self, image: Any, position: int) -> Any:
        # The hosts' transforms draw from all three global streams.
        seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        assert self.transform is not None
        return self.transform(image)


def _enumerate_names(names: Sequence[Any]) -> list[int]:
    """Number the distinct names 0, 1, ... in sorted order; an unknown one stays."""
    known = sorted({name for name in names if name != UNKNOWN}, key=_order)
    number = {name: i for i, name in enumerate(known)}
    return [number.get(name, UNKNOWN) for name in names]


def _order(name: Any) -> tuple[bool, Any]:
    """Order numbers as numbers, before names."""
    return (False, name) if isinstance(name, int) else (True, str(name))

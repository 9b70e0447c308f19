"""The door where identities are dropped: images in a fixed order, each its own label."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from selcon_plugin.datasets import read_image_folder
from selcon_plugin.datasets.numbering import UNKNOWN, number_names
from selcon_plugin.datasets.reading import ImageReadError
from selcon_plugin.samplers.stream import SampleKey

# What is known of a file that was readable when the run began.
_FAILED, _UNREPORTED = 1, 2
# Images tried in the place of one that cannot be read.
_REPLACEMENTS = 100

# Path, identity, camera; names or numbers, UNKNOWN where not known.
Item = tuple[str, Any, Any]

_Images = TypeVar("_Images", bound="IndexedImages")


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

    A file may become unreadable during the run. Where a sampler draws it (a
    :class:`SampleKey`), another image of the same label stands in for it, with its own
    index: which one follows from the seed and the place in the stream. Where its own
    features are asked for (an ``int``), it is blank. :attr:`unreadable` tells which files
    failed, in whichever of the processes that read.

    Args:
        items: Path, identity and camera of each image.
        read: Makes an image of a path; raises ``ImageReadError``.
        transform: Makes what the network takes of an image.
        seed: Seed of the augmentation.

    Attributes:
        paths: Path of each image.
        camids: Camera of each image as 0, 1, ...; -1 where unknown.
        evaluation_only_pids: Ground-truth identity of each image as 0, 1, ...; -1 where
            unknown. Only diagnostics and reports may read it; no sample carries it.
        num_left_out: Files that could not be read when the run began, and are not here.
        labels: Cluster of each image, ``(M,)``, negative where it is drawn from none, for
            the choice of stand-ins; None where any image may stand in for any other.
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
        self.evaluation_only_pids = number_names(
            [item[1] for item in items], unknown=UNKNOWN
        )
        self.camids = number_names([item[2] for item in items], unknown=UNKNOWN)
        self.read = read
        self.transform = transform
        self.seed = seed
        self.num_left_out = 0
        self.labels: NDArray[np.int64] | None = None
        self._sizes: list[int] | None = None
        # Written by the processes that read, and read by the one that trains.
        self._flags = torch.zeros(max(1, len(items)), dtype=torch.uint8)
        self._flags.share_memory_()  # type: ignore[no-untyped-call]

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
    def evaluation_only_identities(self) -> Tensor | None:
        """Identity of each image, int64 ``(M,)``, for diagnostics.

        None where identities say nothing: some are not known, all images have one, or each
        its own.
        """
        if UNKNOWN in self.evaluation_only_pids or not 1 < len(
            set(self.evaluation_only_pids)
        ) < len(self):
            return None
        return torch.tensor(self.evaluation_only_pids)

    @property
    def fingerprint(self) -> str:
        """Short hash of names, sizes and cameras: tells if two lists are the same."""
        digest = hashlib.sha256()
        for path, size, camid in zip(self.paths, self.sizes, self.camids, strict=True):
            digest.update(f"{PurePath(path).name}\0{size}\0{camid}\n".encode())
        return digest.hexdigest()[:16]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file, as they were when first asked for; 0 of one that is gone."""
        if self._sizes is None:
            self._sizes = [_size_of(path) for path in self.paths]
        return self._sizes

    @property
    def unreadable(self) -> Tensor:
        """Whether the last try to read each image failed, bool ``(M,)``."""
        return self._flagged(_FAILED)

    def reset_unreadable(self) -> None:
        """Take all images for readable, until they are read again."""
        self._flags &= _UNREPORTED

    def pop_unreported(self) -> Tensor:
        """Return which images have failed since the last call, bool ``(M,)``."""
        unreported = self._flagged(_UNREPORTED)
        self._flags &= _FAILED
        return unreported

    def _flagged(self, flag: int) -> Tensor:
        return self._flags[: len(self)].bitwise_and(flag).bool()

    def with_items(
        self: _Images, items: Sequence[Item], sizes: Sequence[int], num_left_out: int
    ) -> _Images:
        """Return another list of images under the same transform and seed.

        Args:
            items: Path, identity and camera of each image, sorted by path.
            sizes: Bytes of each file.
            num_left_out: Files left out of the list.

        Returns:
            The images.
        """
        other = copy.copy(self)
        IndexedImages.__init__(other, items, self.read, self.transform, self.seed)
        other._sizes = list(sizes)
        other.num_left_out = num_left_out
        return other

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
        if isinstance(key, SampleKey):
            index, image = self._draw(key)
            position = key.position
        else:
            index = position = key
            image = self._read(index)
            if image is None:
                image = Image.new("RGB", (64, 128))
        if get_worker_info() is not None:
            return self.sample(index, self._augment(image, position))
        # The seed is set in the training process itself: leave its streams as they were.
        with torch.random.fork_rng(devices=[]):
            python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
            image = self._augment(image, position)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
        return self.sample(index, image)

    def _draw(self, key: SampleKey) -> tuple[int, Any]:
        """Read an image, or another that may be drawn in its place."""
        image = self._read(key.index)
        if image is not None:
            return key.index, image
        for index in self._replacements(key):
            image = self._read(index)
            if image is not None:
                return index, image
        raise RuntimeError(
            f"{self.paths[key.index]} cannot be read, nor can any image drawn in its "
            "place: is the disk that holds them still there?"
        )

    def _replacements(self, key: SampleKey) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, key.position, key.index))
        if self.labels is None:
            groups = [np.arange(len(self))]
        else:
            # One that is in no cluster may be drawn only where the sampler drew such a one.
            same = self.labels == self.labels[key.index]
            groups = [np.flatnonzero(same), np.flatnonzero(~same & (self.labels >= 0))]
        for group in groups:
            yield from rng.permutation(group)[:_REPLACEMENTS].tolist()

    def _read(self, index: int) -> Any:
        """Read an image; None, and a mark, where it cannot be read."""
        flags = self._flags.numpy()
        try:
            image = self.read(self.paths[index])
        except ImageReadError:
            flags[index] = _FAILED | _UNREPORTED
            return None
        if flags[index] & _FAILED:
            flags[index] &= _UNREPORTED
        return image

    def _augment(self, image: Any, position: int) -> Any:
        # The hosts' transforms draw from all three global streams.
        seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        assert self.transform is not None
        return self.transform(image)


def _size_of(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0

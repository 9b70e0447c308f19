"""Label-free data set wrapper: images in a fixed order, each with its index as label."""

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
from selcon_plugin.datasets.content import content_hashes
from selcon_plugin.datasets.numbering import UNKNOWN, camera_name, number_names
from selcon_plugin.datasets.reading import ImageReadError
from selcon_plugin.distributed import rank
from selcon_plugin.engine.patches import transformed
from selcon_plugin.io.errors import ResourceError
from selcon_plugin.samplers.stream import SampleKey

# Flags of a file that was readable when the run started.
_FAILED, _UNREPORTED = 1, 2
# Number of replacements that are tried for an unreadable image.
_REPLACEMENTS = 100

# Path, identity and camera of an image; names or numbers, UNKNOWN where not known.
Item = tuple[str, Any, Any]

_Images = TypeVar("_Images", bound="IndexedImages")


def extra_items(folder: str) -> list[Item]:
    """List a folder of additional training images, such as generated ones.

    Args:
        folder: Folder of images; empty for none.

    Returns:
        Its images, with unknown identity and camera.

    Raises:
        ValueError: If the folder has no image. ``FileNotFoundError`` if it does not exist.
    """  # noqa: DOC502  (raised as the type of the caught error)
    if not folder:
        return []
    try:
        images = read_image_folder(folder, camera_pattern="none")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"EXTRA_IMAGES: {error}") from error
    return [(image.path, UNKNOWN, UNKNOWN) for image in images]


class IndexedImages(Dataset[dict[str, Any]]):
    """Data set of images whose only label is their own index.

    Images are sorted by path, so that row i of a memory bank is the same image whatever
    order the file system lists them in. Random augmentation is seeded by the sample's
    position in the stream. An adapter defines the format of a sample by overriding
    :meth:`sample`.

    A file may become unreadable during the run. If a sampler requests it (with a
    :class:`SampleKey`), another image of the same label replaces it, with its own index;
    the seed and the position in the stream determine which one. If its features are
    requested (with an ``int``), a blank image is used. :attr:`unreadable` marks the files
    that failed in any of the reading processes.

    Args:
        items: Path, identity and camera of each image.
        read: Reads the image at a path; raises ``ImageReadError``.
        transform: Converts an image into the network's input.
        seed: Seed of the augmentation.

    Attributes:
        paths: Path of each image.
        camids: Camera of each image as 0, 1, ...; -1 where unknown.
        camera_names: Name of each camera as its user wrote it, for reports.
        evaluation_only_pids: Ground-truth identity of each image as 0, 1, ...; -1 where
            unknown. Only diagnostics and reports may read it; no sample carries it.
        num_left_out: Number of files that were unreadable when the run started and are not
            part of this data set.
        labels: Cluster of each image, ``(M,)``, negative for an image in no cluster, for
            the choice of replacements; None where any image may replace any other.
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
        named = dict(zip(self.camids, [item[2] for item in items], strict=True))
        self.camera_names = [camera_name(named[i]) for i in sorted(named) if i >= 0]
        self.read = read
        self.transform = transform
        self.seed = seed
        self.num_left_out = 0
        self.labels: NDArray[np.int64] | None = None
        self._sizes: list[int] | None = None
        self._hashes: list[str] | None = None
        # The reading processes write these flags, and the training process reads them.
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

        None where identities carry no information: some are unknown, or all images have the
        same one, or each image has its own.
        """
        if UNKNOWN in self.evaluation_only_pids or not 1 < len(
            set(self.evaluation_only_pids)
        ) < len(self):
            return None
        return torch.tensor(self.evaluation_only_pids)

    @property
    def fingerprint(self) -> str:
        """Short hash of names, sizes and cameras, to compare two lists of images."""
        digest = hashlib.sha256()
        for path, size, camid in zip(self.paths, self.sizes, self.camids, strict=True):
            digest.update(
                f"{PurePath(path).name}\0{size}\0{camid}\n".encode(
                    "utf-8", "surrogateescape"
                )
            )
        return digest.hexdigest()[:16]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file when this was first read; 0 for a file that is gone."""
        if self._sizes is None:
            self._sizes = [_size_of(path) for path in self.paths]
        return self._sizes

    @property
    def hashes(self) -> list[str]:
        """Hash of each file's content when this was first read; empty for one that is gone.

        A list that was read from an earlier version holds none.
        """
        if self._hashes is None:
            self._hashes = content_hashes(self.paths, progress=rank() == 0)
        return self._hashes

    @property
    def unreadable(self) -> Tensor:
        """Mask of the images whose last attempt to be read failed, bool ``(M,)``."""
        return self._flagged(_FAILED)

    def reset_unreadable(self) -> None:
        """Mark all images as readable until they are read again."""
        self._flags &= _UNREPORTED

    def pop_unreported(self) -> Tensor:
        """Return which images have failed since the last call, bool ``(M,)``."""
        unreported = self._flagged(_UNREPORTED)
        self._flags &= _FAILED
        return unreported

    def _flagged(self, flag: int) -> Tensor:
        return self._flags[: len(self)].bitwise_and(flag).bool()

    def with_items(
        self: _Images,
        items: Sequence[Item],
        sizes: Sequence[int],
        num_left_out: int,
        hashes: Sequence[str],
    ) -> _Images:
        """Return another list of images under the same transform and seed.

        Args:
            items: Path, identity and camera of each image, sorted by path.
            sizes: Bytes of each file.
            num_left_out: Files left out of the list.
            hashes: Hash of each file's content; empty where it is unknown.

        Returns:
            The images.
        """
        other = copy.copy(self)
        IndexedImages.__init__(other, items, self.read, self.transform, self.seed)
        other._sizes, other._hashes = list(sizes), list(hashes)
        other.num_left_out = num_left_out
        return other

    def with_transform(self, transform: Callable[[Any], Any]) -> IndexedImages:
        """Return the same images in the same order under another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def sample(self, index: int, image: Any) -> dict[str, Any]:
        """Build the sample that the adapter's loader expects.

        Args:
            index: Index of the image.
            image: Transformed image.

        Returns:
            Values of the sample by name.
        """
        raise NotImplementedError

    def image_of(self, sample: dict[str, Any]) -> Tensor:
        """Return the image of a sample.

        Args:
            sample: Result of :meth:`sample`.

        Returns:
            Image, shape ``(3, h, w)``.
        """
        raise NotImplementedError

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        if isinstance(key, SampleKey):
            index, image = self._read_or_replace(key)
            position = key.position
        else:
            index = position = key
            image = self._read(index)
            if image is None:
                image = Image.new("RGB", (64, 128))
        if get_worker_info() is not None:
            return self.sample(index, self._augment(image, position))
        # Here the seed is set in the training process, whose random streams are restored.
        with torch.random.fork_rng(devices=[]):
            python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
            image = self._augment(image, position)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
        return self.sample(index, image)

    def _read_or_replace(self, key: SampleKey) -> tuple[int, Any]:
        """Read an image, or a replacement if it is unreadable."""
        image = self._read(key.index)
        if image is not None:
            return key.index, image
        for index in self._replacements(key):
            image = self._read(index)
            if image is not None:
                return index, image
        raise ResourceError(
            f"{self.paths[key.index]} cannot be read, nor can any image sampled in its "
            "place: check that the disk with the images is still mounted"
        )

    def _replacements(self, key: SampleKey) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, key.position, key.index))
        if self.labels is None:
            groups = [np.arange(len(self))]
        else:
            # An image in no cluster is a replacement only for another image in no cluster.
            same = self.labels == self.labels[key.index]
            groups = [np.flatnonzero(same), np.flatnonzero(~same & (self.labels >= 0))]
        for group in groups:
            yield from rng.permutation(group)[:_REPLACEMENTS].tolist()

    def _read(self, index: int) -> Any:
        """Read an image; return None and flag it if it is unreadable."""
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
        # The hosts' transforms use all three global random streams.
        seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        assert self.transform is not None
        return transformed(self.transform, image, self._read_random)

    def _read_random(self) -> Any:
        """Read the image that the random stream of Python selects; None if unreadable."""
        return self._read(random.randrange(len(self)))


def _size_of(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0

"""Label-free data set and loaders for torchreid, with image indices as ``pid``."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from selcon_plugin.datasets.numbering import UNKNOWN
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.datasets.slow_reads import hung_readers_named, loader_timeout
from selcon_plugin.engine.image_check import check_test_images, readable_items
from selcon_plugin.engine.images import IndexedImages, Item, extra_items
from selcon_plugin.engine.stopping import ignore_stop_signals
from selcon_plugin.samplers.stream import BatchStream

logger = logging.getLogger(__name__)


class IndexedReIDImages(IndexedImages):
    """Images of a torchreid data set whose only label is their own index.

    A sample has torchreid's format, and its ``pid`` is the index.
    """

    def sample(self, index: int, image: Any) -> dict[str, Any]:
        """Build a sample of torchreid, whose ``pid`` is the image's index."""
        return {
            "img": image,
            "pid": index,
            "camid": self.camids[index],
            "impath": self.paths[index],
            "dsetid": 0,
        }

    def image_of(self, sample: dict[str, Any]) -> Tensor:
        """Return the image in a sample."""
        image: Tensor = sample["img"]
        return image


def training_images(
    datamanager: Any, seed: int, extra_images: str = "", max_unreadable_ratio: float = 0.05
) -> IndexedReIDImages:
    """Return the training images of a data manager with any sources.

    Args:
        datamanager: torchreid's ``ImageDataManager``.
        extra_images: Folder of additional images.
        seed: Seed of the augmentation.
        max_unreadable_ratio: Fraction of the images that may be left out as unreadable.

    Returns:
        The readable images with the manager's training transform.

    Raises:
        ValueError: If it is a manager of videos, or too many images are unreadable.
    """
    if datamanager.data_type != "image":
        raise ValueError(
            "ImageSelConEngine trains on images: pass an ImageDataManager, not a "
            f"manager of {datamanager.data_type} data"
        )
    trainset = datamanager.train_loader.dataset
    if trainset.k_tfm > 1:
        logger.warning("k_tfm %d: one augmented copy of each image is used", trainset.k_tfm)
    items: list[Item] = [
        (path, _known(pid), _known(camid)) for path, pid, camid, *_ in trainset.train
    ]
    items += extra_items(extra_images)
    items, num_left_out = readable_items(items, max_unreadable_ratio)
    images = IndexedReIDImages(items, read_rgb, trainset.transform, seed)
    images.num_left_out = num_left_out
    return images


def check_test_sets(test_loader: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse test sets with unreadable images before the training.

    Args:
        test_loader: Loaders of queries and gallery by test set, as in the manager.

    Raises:
        ValueError: If there are such images; the message lists them.
    """  # noqa: DOC502  (raised by the functions called here)
    for loaders in test_loader.values():
        images = loaders["query"].dataset.data + loaders["gallery"].dataset.data
        check_test_images([path for path, *_ in images])


def _known(number: int) -> int:
    return UNKNOWN if number < 0 else number


class EpochLoader:
    """Loader of one epoch per iteration, as torchreid's engines expect it.

    Args:
        dataset: Training images.
        sampler: Infinite sampler, which starts each epoch at its ``start``.
        iters_per_epoch: Number of batches per epoch.
        num_workers: Number of processes that read images.
        pin_memory: Whether batches are in pinned memory, for fast transfers to a GPU.

    Attributes:
        steps_done: Number of batches of the epoch to skip; the sampler starts after them.
    """

    def __init__(
        self,
        dataset: IndexedReIDImages,
        sampler: BatchStream,
        iters_per_epoch: int,
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = sampler.batch_size
        self._iters_per_epoch = iters_per_epoch
        self._options = {"num_workers": num_workers, "pin_memory": pin_memory}
        self.steps_done = 0

    def __len__(self) -> int:
        return self._iters_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Exactly the keys of the epoch, because workers read ahead.
        num_batches = len(self) - self.steps_done
        keys = list(itertools.islice(self.sampler, num_batches * self.batch_size))
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=keys,
            worker_init_fn=ignore_stop_signals,
            timeout=loader_timeout(int(self._options["num_workers"])),
            **self._options,  # type: ignore[arg-type]
        )
        # A loader that starts draws a seed, which must not change the training's stream.
        with torch.random.fork_rng(devices=[]):
            batches = iter(loader)
        with hung_readers_named():
            yield from batches


class ExtractionLoader:
    """Loader of every image once, in order, with the test transform.

    Args:
        dataset: Images with the test transform.
        batch_size: Number of images per batch.
        num_workers: Number of processes that read images.
        pin_memory: Whether batches are in pinned memory, for fast transfers to a GPU.
    """

    def __init__(
        self,
        dataset: IndexedImages,
        batch_size: int,
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._loader = DataLoader(
            dataset,
            batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_stop_signals,
            timeout=loader_timeout(num_workers),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with hung_readers_named():
            for batch in self._loader:
                yield batch["img"], batch["pid"]

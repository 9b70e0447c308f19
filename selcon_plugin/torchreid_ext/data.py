"""The door where identities are dropped: torchreid's images, label-blind and indexed."""

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
from selcon_plugin.engine.image_check import check_test_images, readable_items
from selcon_plugin.engine.images import IndexedImages, Item, extra_items
from selcon_plugin.engine.stopping import ignore_stop_signals
from selcon_plugin.samplers.stream import BatchStream

logger = logging.getLogger(__name__)


class IndexedReIDImages(IndexedImages):
    """Images of a torchreid data set whose only label is their own index.

    A sample is torchreid's, with ``pid`` = index.
    """

    def sample(self, index: int, image: Any) -> dict[str, Any]:
        """Make torchreid's sample, whose ``pid`` is the image's index."""
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
    """Take the training images of a data manager, whatever its sources.

    Args:
        datamanager: torchreid's ``ImageDataManager``.
        extra_images: Folder of images that join them.
        seed: Seed of the augmentation.
        max_unreadable_ratio: Share of the images that may be left out as unreadable.

    Returns:
        The readable images with the manager's training transform.

    Raises:
        ValueError: If it is a manager of videos, or too many images cannot be read.
    """
    if datamanager.data_type != "image":
        raise ValueError(
            "ImageSelConEngine trains on images: give it an ImageDataManager, not a "
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
    """Refuse test sets with images that cannot be read, before the training.

    Args:
        test_loader: Loaders of queries and gallery by test set, as the manager has them.

    Raises:
        ValueError: If there are such images; lists them.
    """  # noqa: DOC502  (raised by the functions called here)
    for loaders in test_loader.values():
        images = loaders["query"].dataset.data + loaders["gallery"].dataset.data
        check_test_images([path for path, *_ in images])


def _known(number: int) -> int:
    return UNKNOWN if number < 0 else number


class EpochLoader:
    """The batches of one epoch after the other, as torchreid's engines iterate them.

    Args:
        dataset: Training images.
        sampler: Endless; begins each epoch at its ``start``.
        iters_per_epoch: Batches in an epoch.
        num_workers: Processes that read images.
        pin_memory: Whether batches are put where a GPU fetches them fast.

    Attributes:
        steps_done: Batches of the epoch that are left out; the sampler begins behind them.
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
        # No more keys than the epoch has: workers read ahead.
        num_batches = len(self) - self.steps_done
        keys = list(itertools.islice(self.sampler, num_batches * self.batch_size))
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=keys,
            worker_init_fn=ignore_stop_signals,
            **self._options,  # type: ignore[arg-type]
        )
        # A loader that starts draws a seed: the training's own stream must not notice.
        with torch.random.fork_rng(devices=[]):
            batches = iter(loader)
        yield from batches


class ExtractionLoader:
    """Every image once, in order, under the test transform.

    Args:
        dataset: Images with the test transform.
        batch_size: Images in a batch.
        num_workers: Processes that read images.
        pin_memory: Whether batches are put where a GPU fetches them fast.
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
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            yield batch["img"], batch["pid"]

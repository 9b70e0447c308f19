"""The door where identities are dropped: FastReID's data, label-blind and indexed."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from fastreid.config import CfgNode
from fastreid.data.build import build_reid_test_loader, build_reid_train_loader
from fastreid.data.common import CommDataset
from fastreid.data.data_utils import read_image
from fastreid.data.transforms import build_transforms
from fastreid.utils import comm
from torch.utils.data import Dataset, get_worker_info

from selcon_plugin.fastreid_ext.config import STREAM_SAMPLER, sampler_name
from selcon_plugin.fastreid_ext.datasets import UNKNOWN_CAMERA, UNKNOWN_PID, build_dataset
from selcon_plugin.samplers import BatchStream, ClusterSampler, SampleKey, StreamSampler

logger = logging.getLogger(__name__)

# FastReID's ToTensor uses a storage class that torch 2 warns about, once in every worker.
warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)

# What FastReID's data sets list: path, identity, camera.
Item = tuple[str, Any, Any]
# FastReID's sampler that needs no identities; ours does the same, and can resume.
_LABEL_FREE_SAMPLER = "TrainingSampler"


class IndexedDataset(Dataset[dict[str, Any]]):
    """Images whose only label is their own index.

    A sample is what FastReID's loader expects, with ``targets`` = index. Images are sorted
    by path, so that row i of a memory bank is the same image whatever order the file system
    lists them in. Random augmentation is seeded by the sample's place in the stream.

    Args:
        items: FastReID's ``(path, identity, camera)``.
        transform: FastReID's transform.
        seed: Seed of the augmentation.

    Attributes:
        paths: Path of each image.
        camids: Camera of each image as 0, 1, ...; -1 where unknown.
        true_pids: Identity of each image as 0, 1, ...; -1 where unknown. For diagnostics
            only; no sample carries it.
    """

    def __init__(self, items: Sequence[Item], transform: Any, seed: int = 0) -> None:
        items = sorted(items, key=lambda item: item[0])
        self.paths = [item[0] for item in items]
        self.true_pids = _enumerate_names([item[1] for item in items], UNKNOWN_PID)
        self.camids = _enumerate_names([item[2] for item in items], UNKNOWN_CAMERA)
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """Number of classes: every image is one."""
        return len(self.paths)

    @property
    def num_cameras(self) -> int:
        """Number of known cameras."""
        return len(set(self.camids) - {UNKNOWN_CAMERA})

    @property
    def fingerprint(self) -> str:
        """Short hash of names, sizes and cameras: tells if two lists are the same."""
        digest = hashlib.sha256()
        for path, camid in zip(self.paths, self.camids, strict=True):
            size = os.path.getsize(path)
            digest.update(f"{PurePath(path).name}\0{size}\0{camid}\n".encode())
        return digest.hexdigest()[:16]

    def with_transform(self, transform: Any) -> IndexedDataset:
        """Return the same images in the same order under another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        if not isinstance(key, SampleKey):
            key = SampleKey(key, key)
        index, position = key.index, key.position
        # Without a format FastReID takes the indices of a palette for shades of grey.
        image = read_image(self.paths[index], format="RGB")
        if get_worker_info() is None:
            # The seed is set in the training process itself: leave its streams as they
            # were.
            with torch.random.fork_rng(devices=[]):
                python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
                images = self._augment(image, position)
                random.setstate(python_state)
                np.random.set_state(numpy_state)  # noqa: NPY002
        else:
            images = self._augment(image, position)
        return {
            "images": images,
            "targets": index,
            "camids": self.camids[index],
            "img_paths": self.paths[index],
        }

    def _augment(self, image: Any, position: int) -> Any:
        # FastReID's transforms draw from all three global streams.
        seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        return self.transform(image)


def _enumerate_names(names: Sequence[Any], unknown: int) -> list[int]:
    """Number the distinct names 0, 1, ... in sorted order; ``unknown`` stays as it is."""
    known = sorted({name for name in names if name != unknown}, key=str)
    number = {name: i for i, name in enumerate(known)}
    return [number.get(name, unknown) for name in names]


class TrainLoader:
    """FastReID's train loader, started only when the first batch is asked for.

    FastReID's trainer makes its iterator when it is built, before it knows where to resume;
    a loader that starts at once would prefetch batches of the wrong place.

    Args:
        host_loader: What FastReID's ``build_reid_train_loader`` returned.
        sampler: The sampler inside it.

    Attributes:
        dataset: The indexed data set.
        sampler: As given; set its ``start`` to resume.
    """

    def __init__(self, host_loader: Any, sampler: BatchStream) -> None:
        self._host_loader = host_loader
        self.dataset: IndexedDataset = host_loader.dataset
        self.sampler = sampler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A loader that starts draws a seed: the training's own stream must not notice.
        with torch.random.fork_rng(devices=[]):
            batches = iter(self._host_loader)
        try:
            yield from batches
        finally:
            self._host_loader.shutdown()  # stops the thread that copies to a GPU


def training_items(cfg: CfgNode) -> list[Item]:
    """List the training images of all data sets in ``DATASETS.NAMES``."""
    items: list[Item] = []
    for name in cfg.DATASETS.NAMES:
        data = build_dataset(cfg, name, combineall=cfg.DATASETS.COMBINEALL)
        if comm.is_main_process():
            data.show_train()
        items.extend(data.train)
    return items


def build_train_loader(cfg: CfgNode) -> TrainLoader:
    """Build the label-blind train loader on FastReID's own.

    Args:
        cfg: Complete config.

    Returns:
        Loader of FastReID batches whose ``targets`` are image indices.

    Raises:
        ValueError: If there are fewer training images than a batch holds, or the batch is
        not
            a multiple of the number of processes.
    """
    batch_size, world_size = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({batch_size}, over all processes) must be a multiple "
            f"of the {world_size} processes"
        )
    seed = cfg.MODEL.SELCON.SEED
    dataset = IndexedDataset(
        training_items(cfg), build_transforms(cfg, is_train=True), seed
    )
    if len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} training images do not fill one batch: lower "
            f"SOLVER.IMS_PER_BATCH ({batch_size}) or add images"
        )
    sampler = _build_sampler(cfg, len(dataset))
    host_loader = build_reid_train_loader(
        dataset,
        sampler=sampler,
        total_batch_size=batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return TrainLoader(host_loader, sampler)


def _build_sampler(cfg: CfgNode, num_images: int) -> BatchStream:
    node = cfg.MODEL.SELCON
    if cfg.DATALOADER.SAMPLER_TRAIN != _LABEL_FREE_SAMPLER:
        logger.warning(
            "DATALOADER.SAMPLER_TRAIN %s groups images by identity, which is not known "
            "here: MODEL.SELCON.SAMPLER %s draws the batches",
            cfg.DATALOADER.SAMPLER_TRAIN,
            sampler_name(cfg),
        )
    common = {
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "seed": node.SEED,
        "rank": comm.get_rank(),
        "world_size": comm.get_world_size(),
    }
    if sampler_name(cfg) == STREAM_SAMPLER:
        return StreamSampler(num_images, **common)
    instances = cfg.DATALOADER.NUM_INSTANCE
    pieces = common["world_size"] * node.MICRO_BATCHES
    if cfg.SOLVER.IMS_PER_BATCH % (pieces * instances):
        # Else the images of a cluster would be torn apart.
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a multiple of "
            f"DATALOADER.NUM_INSTANCE ({instances}) x MODEL.SELCON.MICRO_BATCHES "
            f"({node.MICRO_BATCHES}) x processes ({common['world_size']})"
        )
    return ClusterSampler(
        planner=sampler_name(cfg),
        num_instances=instances,
        outlier_share=node.OUTLIER_SHARE,
        **common,
    )


def build_extraction_loader(cfg: CfgNode, dataset: IndexedDataset) -> Any:
    """Build a loader that shows every training image once, with FastReID's test transform.

    Args:
        cfg: Complete config.
        dataset: Images to show, in their order; the ranks share them.

    Returns:
        FastReID's test loader.
    """
    loader, _ = build_reid_test_loader(
        dataset.with_transform(build_transforms(cfg, is_train=False)),
        test_batch_size=cfg.TEST.IMS_PER_BATCH,
        num_query=0,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return loader


def build_test_loader(cfg: CfgNode, dataset_name: str) -> tuple[Any, int]:
    """Build FastReID's test loader for a registered data set.

    Args:
        cfg: Complete config.
        dataset_name: Registered name.

    Returns:
        The loader over query then gallery, and the number of queries.
    """
    data = build_dataset(cfg, dataset_name)
    if comm.is_main_process():
        data.show_test()
    test_set = CommDataset(
        data.query + data.gallery, build_transforms(cfg, is_train=False), relabel=False
    )
    loader: tuple[Any, int] = build_reid_test_loader(
        test_set,
        test_batch_size=cfg.TEST.IMS_PER_BATCH,
        num_query=len(data.query),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return loader

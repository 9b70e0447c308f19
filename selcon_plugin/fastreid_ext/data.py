"""Label-free data sets and loaders for FastReID, with image indices as targets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fastreid.config import CfgNode, get_cfg
from fastreid.data.build import build_reid_test_loader, build_reid_train_loader
from fastreid.data.common import CommDataset
from fastreid.data.transforms import build_transforms
from fastreid.utils import comm
from torch import Tensor

from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.datasets.slow_reads import hung_readers_named, loader_timeout
from selcon_plugin.engine.batches import build_sampler, fitting_batch_size
from selcon_plugin.engine.image_check import check_test_images, readable_items
from selcon_plugin.engine.images import IndexedImages, Item, extra_items
from selcon_plugin.engine.stopping import ignore_stop_signals
from selcon_plugin.fastreid_ext.config import sampler_name
from selcon_plugin.fastreid_ext.datasets import build_dataset
from selcon_plugin.fastreid_ext.evaluation import scope_of
from selcon_plugin.fastreid_ext.host_values import with_fitting_neighbors
from selcon_plugin.samplers.stream import BatchStream

logger = logging.getLogger(__name__)

# FastReID's ToTensor uses a storage class that torch 2 warns about, once in every worker.
warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)

_DEFAULT_BATCH_SIZE = get_cfg().SOLVER.IMS_PER_BATCH
# FastReID's sampler that needs no identities; ours does the same and can resume.
_LABEL_FREE_SAMPLER = "TrainingSampler"


class IndexedDataset(IndexedImages):
    """Images in the format of FastReID's loader, whose only label is their own index.

    Args:
        items: Path, identity and camera of each image, as in FastReID.
        transform: FastReID's transform.
        seed: Seed of the augmentation.
    """

    def __init__(self, items: Sequence[Item], transform: Any, seed: int = 0) -> None:
        super().__init__(items, read_rgb, transform, seed)

    @property
    def num_classes(self) -> int:
        """Number of classes; every image is a class of its own."""
        return len(self)

    def sample(self, index: int, image: Any) -> dict[str, Any]:
        """Build a sample of FastReID, whose ``targets`` is the image's index."""
        return {
            "images": image,
            "targets": index,
            "camids": self.camids[index],
            "img_paths": self.paths[index],
        }

    def image_of(self, sample: dict[str, Any]) -> Tensor:
        """Return the image in a sample."""
        image: Tensor = sample["images"]
        return image


class TrainLoader:
    """FastReID's train loader, which starts only when the first batch is requested.

    FastReID's trainer creates its iterator in its constructor, before it knows where to
    resume; a loader that started at once would prefetch batches of the wrong position.

    Args:
        host_loader: Result of FastReID's ``build_reid_train_loader``.
        sampler: Sampler of that loader.

    Attributes:
        dataset: The indexed data set.
        sampler: Sampler of the loader; set its ``start`` to resume.
    """

    def __init__(self, host_loader: Any, sampler: BatchStream) -> None:
        self._host_loader = host_loader
        self.dataset: IndexedDataset = host_loader.dataset
        self.sampler = sampler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A loader that starts draws a seed, which must not change the training's stream.
        with torch.random.fork_rng(devices=[]):
            batches = iter(self._host_loader)
        try:
            with hung_readers_named():
                yield from batches
        finally:
            self._host_loader.shutdown()  # stops the thread that copies to a GPU
            vars(self._host_loader).pop("iter", None)  # the iterator owns the workers


def check_label_free(loader: Any, trainer: str) -> None:
    """Refuse a loader of identities, which a trainer of a script may build.

    Args:
        loader: Result of the trainer's ``build_train_loader``.
        trainer: Name of its class, for the error message.

    Raises:
        ValueError: If the loader is not a :class:`TrainLoader`.
    """
    if not isinstance(loader, TrainLoader):
        raise ValueError(
            f"{trainer}.build_train_loader returns a {type(loader).__name__}, whose labels "
            "are identities: remove the method, and the label-free loader is used"
        )


def training_items(cfg: CfgNode) -> list[Item]:
    """List the training images of all data sets in ``DATASETS.NAMES``, and extra ones."""
    if not cfg.DATASETS.NAMES:
        raise ValueError("DATASETS.NAMES is empty: name a data set to train on")
    items: list[Item] = []
    for name in cfg.DATASETS.NAMES:
        data = build_dataset(
            cfg, name, splits=("train",), combineall=cfg.DATASETS.COMBINEALL
        )
        if comm.is_main_process():
            data.show_train()
        items.extend(data.train)
    return items + extra_items(cfg.MODEL.SELCON.EXTRA_IMAGES)


def training_images(cfg: CfgNode) -> IndexedDataset:
    """Return the readable training images with FastReID's training transform.

    Args:
        cfg: Complete config.

    Returns:
        The images.

    Raises:
        ValueError: If too many images are unreadable.
    """  # noqa: DOC502  (raised by the functions called here)
    node = cfg.MODEL.SELCON
    items, num_left_out = readable_items(training_items(cfg), node.MAX_UNREADABLE_RATIO)
    dataset = IndexedDataset(items, build_transforms(cfg, is_train=True), node.SEED)
    dataset.num_left_out = num_left_out
    return dataset


def build_train_loader(
    cfg: CfgNode, images: IndexedDataset | None = None, *, lower_default: bool = False
) -> TrainLoader:
    """Build the label-free train loader from FastReID's own.

    Args:
        cfg: Complete config.
        images: Images to train on; None for the readable ones of the config.
        lower_default: Whether FastReID's default batch size is lowered where the images do
            not fill one batch.

    Returns:
        Loader of FastReID batches whose ``targets`` are image indices.

    Raises:
        ValueError: If there are fewer training images than a batch holds, too many are
            unreadable, or the batch cannot be split evenly.
    """  # noqa: DOC502  (raised by the functions called here)
    dataset = training_images(cfg) if images is None else images
    if lower_default:
        cfg = _with_fitting_batch(cfg, len(dataset), comm.get_world_size())
    _warn_of_host_sampler(cfg)
    sampler = _build_sampler(cfg, len(dataset), comm.get_rank(), comm.get_world_size())
    host_loader = build_reid_train_loader(
        dataset,
        sampler=sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    host_loader.worker_init_fn = ignore_stop_signals
    host_loader.timeout = loader_timeout(cfg.DATALOADER.NUM_WORKERS)
    return TrainLoader(host_loader, sampler)


def _with_fitting_batch(cfg: CfgNode, num_images: int, world_size: int) -> CfgNode:
    return with_batch_size(
        cfg,
        fitting_batch_size(
            cfg.SOLVER.IMS_PER_BATCH,
            _DEFAULT_BATCH_SIZE,
            num_images,
            sampler=sampler_name(cfg),
            num_instances=cfg.DATALOADER.NUM_INSTANCE,
            micro_batches=cfg.MODEL.SELCON.MICRO_BATCHES,
            world_size=world_size,
            key="SOLVER.IMS_PER_BATCH",
        ),
    )


def with_batch_size(cfg: CfgNode, batch_size: int) -> CfgNode:
    """Return a config with another batch size, or the same one.

    Args:
        cfg: Complete config.
        batch_size: Images in a batch, over all processes.
    """
    if batch_size == cfg.SOLVER.IMS_PER_BATCH:
        return cfg
    changed = cfg.clone()
    changed.defrost()
    changed.SOLVER.IMS_PER_BATCH = batch_size
    if cfg.is_frozen():
        changed.freeze()
    return changed


def check_processes(cfg: CfgNode, world_size: int) -> None:
    """Check that there are images and batches for a number of processes.

    Args:
        cfg: Complete config.
        world_size: Number of processes.

    Raises:
        ValueError: If there are too few images, or the batch cannot be split evenly.
    """  # noqa: DOC502  (raised by the functions called here)
    num_images = len(training_items(cfg))
    _build_sampler(
        _with_fitting_batch(cfg, num_images, world_size), num_images, 0, world_size
    )


def check_test_sets(cfg: CfgNode) -> None:
    """Check before the training that the test sets can be evaluated.

    Args:
        cfg: Complete config.

    Raises:
        ValueError: If a test set has no images, or some are unreadable.
            ``FileNotFoundError`` if it does not exist.
    """
    for name in cfg.DATASETS.TESTS:
        data = build_dataset(cfg, name, splits=("query", "gallery"))
        if not data.query or not data.gallery:
            raise ValueError(
                f"DATASETS.TESTS: {name} has no query and gallery images: use another data "
                "set, or () for none"
            )
        scope_of(name, data.query, data.gallery)
        with_fitting_neighbors(cfg, name, len(data.query) + len(data.gallery))
        check_test_images([path for path, *_ in data.query + data.gallery])


def _warn_of_host_sampler(cfg: CfgNode) -> None:
    if cfg.DATALOADER.SAMPLER_TRAIN != _LABEL_FREE_SAMPLER:
        logger.warning(
            "DATALOADER.SAMPLER_TRAIN %s groups images by identity, which is unknown here: "
            "MODEL.SELCON.SAMPLER %s samples the batches instead",
            cfg.DATALOADER.SAMPLER_TRAIN,
            sampler_name(cfg),
        )


def _build_sampler(
    cfg: CfgNode, num_images: int, rank: int, world_size: int
) -> BatchStream:
    node = cfg.MODEL.SELCON
    try:
        return build_sampler(
            sampler_name(cfg),
            num_images,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_instances=cfg.DATALOADER.NUM_INSTANCE,
            outlier_ratio=node.OUTLIER_RATIO,
            micro_batches=node.MICRO_BATCHES,
            seed=node.SEED,
            rank=rank,
            world_size=world_size,
        )
    except ValueError as error:
        raise ValueError(
            f"{error} (keys SOLVER.IMS_PER_BATCH, DATALOADER.NUM_INSTANCE, "
            "MODEL.SELCON.MICRO_BATCHES, MODEL.SELCON.OUTLIER_RATIO)"
        ) from error


def build_extraction_loader(cfg: CfgNode, dataset: IndexedDataset) -> Any:
    """Build a loader of every training image once, with FastReID's test transform.

    Args:
        cfg: Complete config.
        dataset: Images to load, in their order; each rank loads its shard.

    Returns:
        FastReID's test loader.
    """
    loader, _ = build_reid_test_loader(
        dataset.with_transform(build_transforms(cfg, is_train=False)),
        test_batch_size=cfg.TEST.IMS_PER_BATCH,
        num_query=0,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = ignore_stop_signals
    loader.timeout = loader_timeout(cfg.DATALOADER.NUM_WORKERS)
    return loader


class _TestImages(CommDataset):
    """FastReID's test images, read in the same way as the training images."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, pid, camid = self.img_items[index][:3]
        image = self.transform(read_rgb(path))
        return {"images": image, "targets": pid, "camids": camid, "img_paths": path}


def build_test_loader(
    cfg: CfgNode,
    dataset_name: str,
    choose: Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]] | None = None,
) -> tuple[Any, int]:
    """Build FastReID's test loader for a registered data set.

    Args:
        cfg: Complete config.
        dataset_name: Registered name.
        choose: Function that returns some of the queries and gallery images; None for all.

    Returns:
        The loader over query then gallery, and the number of queries.
    """
    data = build_dataset(cfg, dataset_name, splits=("query", "gallery"))
    if comm.is_main_process():
        data.show_test()
    query, gallery = data.query, data.gallery
    if choose is not None:
        query, gallery = choose(query, gallery)
    test_set = _TestImages(
        query + gallery, build_transforms(cfg, is_train=False), relabel=False
    )
    loader, num_query = build_reid_test_loader(
        test_set,
        test_batch_size=cfg.TEST.IMS_PER_BATCH,
        num_query=len(query),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = ignore_stop_signals
    loader.timeout = loader_timeout(cfg.DATALOADER.NUM_WORKERS)
    return loader, num_query

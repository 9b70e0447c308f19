"""Extraction of training features with FastReID's loaders and the model in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastreid.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selcon_plugin.engine.extraction import extract_embeddings
from selcon_plugin.fastreid_ext.data import IndexedDataset, build_extraction_loader
from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.features import Embeddings


def unwrap(model: nn.Module) -> SelCon:
    """Return the SelCon model, without a wrapping DistributedDataParallel.

    Args:
        model: Model of the trainer.

    Returns:
        The SelCon model.

    Raises:
        ValueError: If the model has another meta-architecture.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inner, SelCon):
        raise ValueError(
            "SelConTrainer trains the meta-architecture SelCon: set "
            f"MODEL.META_ARCHITECTURE to SelCon, not {type(inner).__name__}"
        )
    return inner


class ImagesAndIndex:
    """Iterable over the images of FastReID's batches and their indices.

    Args:
        loader: Loader over an :class:`IndexedDataset`.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            yield batch["images"], batch["targets"]


def extract_training_set(
    cfg: CfgNode, model: SelCon, dataset: IndexedDataset
) -> Embeddings:
    """Compute the embeddings of all training images with the test transform.

    Args:
        cfg: Complete config.
        model: Model; its training mode is restored afterwards.
        dataset: Training images.

    Returns:
        Embeddings of images 0..M-1 on the model's device, the same on all ranks.
    """
    loader = build_extraction_loader(cfg, dataset)
    return extract_embeddings(model, ImagesAndIndex(loader), len(dataset))

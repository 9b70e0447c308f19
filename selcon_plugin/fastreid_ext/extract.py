"""Extraction of the features of data sets into a file, with a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fastreid.config import CfgNode

from selcon_plugin.engine.image_check import readable_items, report_unreadable
from selcon_plugin.fastreid_ext.data import IndexedDataset, training_items
from selcon_plugin.fastreid_ext.embedding import extract_training_set
from selcon_plugin.fastreid_ext.trained_model import load_trained_model
from selcon_plugin.features import check_features
from selcon_plugin.io.atomic import make_folder, replacing


def extract_folder(cfg: CfgNode, output: str | Path) -> tuple[int, int]:
    """Write the features of all images in ``DATASETS.NAMES`` to a NumPy file.

    Args:
        cfg: Complete config; ``MODEL.WEIGHTS`` names the checkpoint.
        output: File to write, with arrays ``paths`` (M,), ``camids`` (M,) with -1 for
            unknown, and unit vectors ``features`` (M, C + S*D) in float32.

    Returns:
        Number of images and feature dimension.
    """
    model = load_trained_model(cfg)
    items, _ = readable_items(training_items(cfg), cfg.MODEL.SELCON.MAX_UNREADABLE_RATIO)
    dataset = IndexedDataset(items, transform=None)
    features = model.test_feature(extract_training_set(cfg, model, dataset)).cpu()
    readable = (~dataset.unreadable).numpy()
    report_unreadable(
        dataset,
        unreported=dataset.pop_unreported(),
        unreadable=dataset.unreadable,
        max_unreadable_ratio=cfg.MODEL.SELCON.MAX_UNREADABLE_RATIO,
        what_happened="they are left out",
    )
    make_folder(Path(output).parent)
    usable = check_features(features[torch.from_numpy(readable)], source=cfg.MODEL.WEIGHTS)
    with replacing(output) as stream:
        np.savez_compressed(
            stream,
            paths=np.array(dataset.paths)[readable],
            camids=np.array(dataset.camids)[readable],
            features=usable,
        )
    return int(readable.sum()), features.shape[1]

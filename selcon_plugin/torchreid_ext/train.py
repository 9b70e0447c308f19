"""Training and evaluation from a config in torchreid's style."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.config.checks import check_name, check_network_file
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.datasets.list_files import DatasetReading
from selcon_plugin.engine.run import seed_all
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.io.safe_loading import safe_extraction
from selcon_plugin.methods import method_class
from selcon_plugin.runs.folder import RunFolder, owned_run
from selcon_plugin.samplers.cluster import AUTO
from selcon_plugin.torchreid_ext.config import (
    KEYS,
    complete_config,
    keys_without_effect,
    run_arguments,
)
from selcon_plugin.torchreid_ext.datasets import (
    IMAGE_FOLDER,
    SYNTHETIC_PERSONS,
    image_dataset_names,
    image_datasets,
    register_image_folder,
    register_synthetic_persons,
)
from selcon_plugin.torchreid_ext.engine import ImageSelConEngine
from selcon_plugin.torchreid_ext.messages import torchreid_hidden
from selcon_plugin.torchreid_ext.models import SelConModel, build_selcon_model
from selcon_plugin.torchreid_ext.options import EngineOptions
from selcon_plugin.torchreid_ext.run_arguments import CONFIG_KEYS
from selcon_plugin.torchreid_ext.weights import load_network

logger = logging.getLogger(__name__)


def build_datamanager(cfg: CfgNode) -> Any:
    """Build torchreid's ``ImageDataManager``.

    Args:
        cfg: Complete config.

    Returns:
        The manager.

    Raises:
        ValueError: If a data set is unknown, or there is none to train on.
        FileNotFoundError: If a data set does not exist.
    """  # noqa: DOC502  (raised by DatasetReading)
    data = cfg.data
    if not data.sources:
        raise ValueError("data.sources is empty: name a data set to train on")
    for key in ("sources", "targets"):
        for name in data[key]:
            check_name(f"data.{key}", name, image_dataset_names())
    names = list(dict.fromkeys([*data.sources, *data.targets]))
    reading = DatasetReading(
        ", ".join(names),
        f"data.sources, data.targets, in {os.path.abspath(os.path.expanduser(data.root))}",
        "Put it there, or set data.root to the folder that contains the data sets",
        [image_datasets()[name] for name in names],
    )
    with safe_extraction(), torchreid_hidden(), reading:
        manager = _build_datamanager(cfg)
        trained_on = manager.train_loader.dataset.train
        reading.check_images("train", [path for path, *_ in trained_on])
        for loaders in manager.test_loader.values():
            for split, loader in loaders.items():
                reading.check_images(split, [path for path, *_ in loader.dataset.data])
    return manager


def _build_datamanager(cfg: CfgNode) -> Any:
    data = cfg.data
    return import_torchreid().data.ImageDataManager(
        root=data.root,
        sources=_bound_names(cfg, data.sources),
        targets=_bound_names(cfg, data.targets),
        height=data.height,
        width=data.width,
        transforms=data.transforms,
        k_tfm=data.k_tfm,
        norm_mean=data.norm_mean,
        norm_std=data.norm_std,
        use_gpu=cfg.use_gpu,
        split_id=data.split_id,
        combineall=data.combineall,
        batch_size_train=cfg.train.batch_size,
        batch_size_test=cfg.test.batch_size,
        workers=data.workers,
        cuhk03_labeled=cfg.cuhk03.labeled_images,
        cuhk03_classic_split=cfg.cuhk03.classic_split,
        market1501_500k=cfg.market1501.use_500k_distractors,
    )


def _bound_names(cfg: CfgNode, names: list[str]) -> list[str]:
    """Replace our data sets by names that are bound to their options in the config."""
    bound = []
    for name in names:
        if name == IMAGE_FOLDER and cfg.image_folder.root:
            folder, pattern = cfg.image_folder.root, cfg.image_folder.camera_pattern
            bound.append(_name_with(name, (folder, pattern)))
            register_image_folder(bound[-1], folder, pattern)
        elif name == SYNTHETIC_PERSONS:
            spec = SyntheticPersonsSpec(**cfg.synthetic_persons)
            same = spec == SyntheticPersonsSpec()
            bound.append(name if same else _name_with(name, spec))
            register_synthetic_persons(bound[-1], spec)
        else:
            bound.append(name)
    return bound


def _name_with(name: str, options: Any) -> str:
    """Return a name that depends on the options, because torchreid knows only names."""
    return f"{name}-{zlib.crc32(repr(options).encode()):08x}"


def _num_parts(node: CfgNode) -> int | None:
    """Return the number of parts; None for what fits the feature map."""
    if not method_class(node.method).uses_parts:
        return 0
    return None if node.num_parts == AUTO else int(node.num_parts)


def build_model(cfg: CfgNode) -> SelConModel:
    """Build the model of a config, on the GPU if the config uses one.

    Args:
        cfg: Complete config.

    Returns:
        The model with ``model.load_weights`` loaded.
    """
    node = cfg.selcon
    weight = KEYS.selected(node, "method").get("global_distance_weight", 0.5)
    model = build_selcon_model(
        cfg.model.name,
        # An evaluation needs no download.
        pretrained=cfg.model.pretrained and not cfg.test.evaluate,
        weights=node.weights,
        last_stride=node.last_stride,
        input_size=(cfg.data.height, cfg.data.width),
        pixel_mean=[255.0 * value for value in cfg.data.norm_mean],
        pixel_std=[255.0 * value for value in cfg.data.norm_std],
        num_parts=_num_parts(node),
        embedding_dim=node.embedding_dim,
        project_global=node.project_global,
        pool=node.pool,
        bn_neck=node.bn_neck,
        feature=node.feature,
        ghost_batch_size=node.ghost_batch_size,
        wave_block=node.wave_block,
    )
    model.own_properties["method"], model.global_distance_weight = node.method, weight
    if cfg.model.load_weights:
        load_network(model, cfg.model.load_weights, initializes=not cfg.test.evaluate)
    return model.cuda() if cfg.use_gpu else model


def build_schedule(
    cfg: CfgNode, model: nn.Module, *, new_layers: Any
) -> tuple[torch.optim.Optimizer, Any]:
    """Build torchreid's optimizer and schedule.

    Args:
        cfg: Complete config.
        model: Model to train.
        new_layers: Direct parts of the model with the rate of new layers, if the config has
            staged rates.

    Returns:
        Optimizer and schedule.
    """
    torchreid, train = import_torchreid(), cfg.train
    optimizer = torchreid.optim.build_optimizer(
        model,
        optim=train.optim,
        lr=train.lr,
        weight_decay=train.weight_decay,
        momentum=cfg.sgd.momentum,
        sgd_dampening=cfg.sgd.dampening,
        sgd_nesterov=cfg.sgd.nesterov,
        rmsprop_alpha=cfg.rmsprop.alpha,
        adam_beta1=cfg.adam.beta1,
        adam_beta2=cfg.adam.beta2,
        staged_lr=train.staged_lr,
        new_layers=new_layers,
        base_lr_mult=train.base_lr_mult,
    )
    scheduler = torchreid.optim.build_lr_scheduler(
        optimizer,
        lr_scheduler=train.lr_scheduler,
        stepsize=train.stepsize,
        gamma=train.gamma,
        max_epoch=train.max_epoch,
    )
    return optimizer, scheduler


def build_engine(cfg: CfgNode, *, overwrite: bool = False) -> ImageSelConEngine:
    """Build data, model, optimizer, schedule and engine.

    Args:
        cfg: Config, which is checked unless it was checked before.
        overwrite: See :class:`ImageSelConEngine`.

    Returns:
        The engine, ready to run.
    """
    cfg = complete_config(cfg)
    node, train = cfg.selcon, cfg.train
    seed_all(node.seed)
    datamanager = build_datamanager(cfg)
    model: nn.Module = build_model(cfg)
    if torch.cuda.device_count() > 1 and cfg.use_gpu:
        model = nn.DataParallel(model)
    # torchreid finds only direct parts of a model; the engine finds other names.
    direct = train.new_layers in ("heads", ["heads"])
    optimizer, scheduler = build_schedule(
        cfg, model, new_layers=train.new_layers if direct else []
    )
    return ImageSelConEngine(
        datamanager,
        model,
        optimizer,
        scheduler,
        use_gpu=cfg.use_gpu,
        num_instances=cfg.sampler.num_instances,
        new_layers=train.new_layers,
        checkpoint_period=node.checkpoint_period,
        checked=EngineOptions.of_config(cfg),
        config=cfg,
        overwrite=overwrite,
    )


def run_config(
    cfg: CfgNode, *, resume: bool = False, overwrite: bool = False
) -> ImageSelConEngine:
    """Train and evaluate, or only evaluate (``test.evaluate``).

    Args:
        cfg: Config, which is checked unless it was checked before.
        resume: Whether to resume from the last checkpoint in ``data.save_dir``, if there is
            one. ``model.resume`` names another one.
        overwrite: Whether a new run may start in the folder of an earlier one, whose files
            are moved aside. Otherwise it is refused.

    Returns:
        The engine after the run; its ``results`` hold the metrics.

    Raises:
        ValueError: If there is nothing to evaluate, no weights to evaluate, the folder
            holds another run, or ``data.save_dir`` is not writable.
        FileNotFoundError: If a file that the config names does not exist.
    """
    cfg = complete_config(cfg)
    if cfg.test.evaluate and not (cfg.model.load_weights or cfg.model.resume):
        raise ValueError("model.load_weights must name a checkpoint to evaluate")
    for key in ("load_weights", "resume"):
        file = cfg.model[key]
        if file and not Path(file).expanduser().exists():
            raise FileNotFoundError(f"model.{key}: there is no checkpoint {file}")
        if file:
            check_network_file(f"model.{key}", file)
    if cfg.test.evaluate:
        return _run(cfg, resume=False, overwrite=overwrite)
    with owned_run(check_output_folder("data.save_dir", cfg.data.save_dir)):
        if not resume and not cfg.model.resume:
            RunFolder(cfg.data.save_dir, overwrite=overwrite).check_new()
        return _run(cfg, resume=resume, overwrite=overwrite)


def _run(cfg: CfgNode, *, resume: bool, overwrite: bool) -> ImageSelConEngine:
    unused = keys_without_effect(cfg)
    if unused and not cfg.test.evaluate:
        logger.warning(
            "No effect in a training without identities: %s. The method has its own loss "
            "(selcon.method) and sampler (selcon.sampler)",
            ", ".join(unused),
        )
    engine = build_engine(cfg, overwrite=overwrite)
    if cfg.test.evaluate and not engine.test_loader:
        raise ValueError("data.targets has no test images: there is nothing to evaluate on")
    arguments = run_arguments(cfg)
    folder = cfg.data.save_dir
    if cfg.model.resume:
        arguments["start_epoch"] = engine.resume(cfg.model.resume)
    elif resume:
        try:
            arguments["start_epoch"] = engine.resume(folder)
        except FileNotFoundError:
            logger.info("There is no checkpoint in %s: the training starts over", folder)
    engine.check_run(arguments, keys=CONFIG_KEYS)
    engine.run(folder, **arguments)
    return engine

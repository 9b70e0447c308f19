"""Host interface of torchreid."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from selcon_plugin.config.help import ConfigHelp
from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import (
    Adaptation,
    NetworkSettings,
    PlainNetwork,
    RecognizedNetwork,
    RunFiles,
    RunKeys,
    RunResult,
)
from selcon_plugin.engine.threads import reserve_cpu_core
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.pretrained import read_state_dict
from selcon_plugin.models.timm import TIMM_PREFIX
from selcon_plugin.models.torchreid import models_of_weights
from selcon_plugin.torchreid_ext import config
from selcon_plugin.torchreid_ext.baseline import supervised_config, train_supervised
from selcon_plugin.torchreid_ext.checkpoints import checkpoint_epoch, list_checkpoints
from selcon_plugin.torchreid_ext.datasets import image_dataset_names
from selcon_plugin.torchreid_ext.inference import load_network
from selcon_plugin.torchreid_ext.plain import plain_network
from selcon_plugin.torchreid_ext.scripts import prepare_script
from selcon_plugin.torchreid_ext.train import run_config
from selcon_plugin.torchreid_ext.weights import feature_layer_width
from selcon_plugin.values import listed

# FastReID's keys for the same settings.
_COMPARABLE_KEYS = {
    "data.save_dir": "OUTPUT_DIR",
    "model.name": "MODEL.BACKBONE.NAME",
    "train.max_epoch": "SOLVER.MAX_EPOCH",
    "train.batch_size": "SOLVER.IMS_PER_BATCH",
    "train.lr": "SOLVER.BASE_LR",
    "train.weight_decay": "SOLVER.WEIGHT_DECAY",
    "sampler.num_instances": "DATALOADER.NUM_INSTANCE",
}
_COMPARABLE_NODES = {
    "selcon.": "MODEL.SELCON.",
    "synthetic_persons.": "DATASETS.SYNTHETIC_PERSONS.",
}


logger = logging.getLogger(__name__)


class TorchreidHost(Host):
    """Host that trains with torchreid's ``ImageDataManager`` and the plugin's engine."""

    name = "torchreid"
    title = "torchreid"
    keys = config.KEYS
    run_keys = RunKeys(
        output="data.save_dir",
        epochs="train.max_epoch",
        batch_size="train.batch_size",
        learning_rate="train.lr",
        num_workers="data.workers",
        weights="model.load_weights",
        training_data="data.sources",
        test_data="data.targets",
    )
    run_files = RunFiles(
        begun="model",
        log="",
        progress=re.compile(
            r"epoch: \[(?P<epoch>\d+)/[^\n]*?\beta "
            r"(?:(?P<days>\d+) days?, )?(?P<time>\d+:\d+:\d+)"
        ),
        first_epoch=1,
    )
    folder_config = "torchreid/image_folder.yml"
    checkpoint_key = "state_dict"

    def default_config(self) -> Any:
        """Return torchreid's default config with the plugin's keys."""
        return config.get_default_config()

    def complete_config(self, cfg: Any) -> Any:
        """Return a checked copy of a config."""
        return config.complete_config(cfg)

    def _name_images(self, cfg: Any, images: str, camera_pattern: str) -> None:
        if camera_pattern:
            cfg.image_folder.camera_pattern = camera_pattern
        if images:
            cfg.data.sources, cfg.data.targets = ["imagefolderreid"], []
            cfg.image_folder.root = str(Path(images).expanduser())

    def _of_network(self, network: NetworkSettings) -> dict[str, Any]:
        found: dict[str, Any] = {"model.pretrained": bool(network.pretrained)}
        if network.backbone:
            found["model.name"] = network.backbone
        if isinstance(network.pretrained, str):
            found["selcon.weights"] = network.pretrained
        elif network.backbone or not network.pretrained:
            found["selcon.weights"] = ""
        if network.input_size:
            found["data.height"], found["data.width"] = network.input_size
        return found

    def _of_device(self, device: str) -> dict[str, Any]:
        if device == "mps":
            logger.warning("torchreid trains on CUDA or on the CPU: mps is not used")
        return {"use_gpu": device.startswith("cuda")}

    def _of_dataset(self, name: str) -> dict[str, Any]:
        return {"data.sources": [name.lower()], "data.targets": [name.lower()]}

    def help(self) -> ConfigHelp:
        """Return the documentation of the config keys."""
        return self._config_help(own=config.OWN_OPTIONS, checked=config.HOST_OPTIONS)

    def default_values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the default config with the defaults of another config's method."""
        return config.default_values(settings)

    def comparable_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Rename settings to FastReID's keys where FastReID has the same setting."""
        result = {_comparable_key(key): value for key, value in settings.items()}
        size = [settings["data.height"], settings["data.width"]]
        result["INPUT.SIZE_TRAIN"] = result["INPUT.SIZE_TEST"] = size
        return result

    def describe_network(self, settings: Mapping[str, Any]) -> tuple[str, str]:
        """Return backbone and input size of a config."""
        size = f"{settings['data.height']}x{settings['data.width']}"
        return str(settings["model.name"]), size

    def check_trainable(self, cfg: Any) -> None:
        """Refuse data sets that torchreid does not know."""
        known = image_dataset_names()
        for name in (*cfg.data.sources, *cfg.data.targets):
            if name not in known:
                raise ValueError(
                    f"unknown data set {name!r}; known are {listed(sorted(known))}"
                )

    def train(
        self, cfg: Any, *, resume: bool = False, overwrite: bool = False, source: str = ""
    ) -> RunResult:
        """Train in this process, on all GPUs that it sees."""
        with reserve_cpu_core() if not cfg.use_gpu and cfg.data.workers else nullcontext():
            engine = run_config(cfg, resume=resume, overwrite=overwrite)
        folder = Path(cfg.data.save_dir)
        return RunResult(
            folder,
            folder / "model" / f"model.pth.tar-{cfg.train.max_epoch}",
            engine.results,
            trained=not cfg.test.evaluate,
        )

    def evaluate(self, cfg: Any, *, source: str = "") -> Mapping[str, Any]:
        """Evaluate ``model.load_weights`` on ``data.targets``."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.test.evaluate = True
        return self.train(cfg).metrics

    def _one_process(self) -> str:
        return (
            "torchreid trains in one process, on all GPUs in CUDA_VISIBLE_DEVICES: remove "
            "--num-gpus and --num-machines"
        )

    def prepare_script(self, command: Sequence[str]) -> None:
        """Let a script such as torchreid's main.py train without identities."""
        prepare_script()

    def supervised_config(self, cfg: Any) -> Any:
        """Return the config of the host's own baseline with network and budget of a run."""
        return supervised_config(cfg)

    def train_supervised(self, cfg: Any) -> None:
        """Train the host's own baseline with identities, and write ``results.json``."""
        train_supervised(cfg)

    def load_network(
        self, cfg: Any, weights: str | Path, device: torch.device
    ) -> InferenceNetwork:
        """Build the network of a config, or a plain model, and load its weights."""
        return load_network(cfg, weights, device)

    def plain_network(
        self, cfg: Any, weights: str | Path, *, global_only: bool = False
    ) -> PlainNetwork:
        """Convert a network to the model of torchreid's own factory."""
        return plain_network(cfg, weights)

    def inference_overrides(self, backbone: str = "") -> dict[str, Any]:
        """Return the settings to load a trained network without download or missing GPU."""
        named: dict[str, Any] = {}
        if backbone:
            # These are torchreid's defaults, because the package's config for folders has a
            # head that is trained from scratch.
            named = {
                "model.name": backbone,
                "selcon.pool": "avg",
                "selcon.bn_neck": False,
                "data.transforms": ["random_flip"],
            }
        cpu = {} if torch.cuda.is_available() else {"use_gpu": False}
        return {**named, "model.pretrained": False, "selcon.weights": "", **cpu}

    def recognize(
        self, state: Mapping[str, torch.Tensor], file_name: str
    ) -> list[RecognizedNetwork]:
        """Find the models of torchreid's factory that weights belong to."""
        return [
            RecognizedNetwork(f"torchreid's {name}", backbone=name)
            for name in models_of_weights(state, file_name)
        ]

    def adaptation_overrides(self, adaptation: Adaptation) -> dict[str, Any]:
        """Return the settings to fine-tune a trained network."""
        found = {
            "model.load_weights": adaptation.weights,
            "model.resume": "",
            "train.optim": "adam",
            "train.lr": adaptation.learning_rate,
            "train.max_epoch": adaptation.epochs,
            "train.start_epoch": 0,
            "train.lr_scheduler": "single_step",
            "train.stepsize": [adaptation.epochs + 1],  # constant
            "train.batch_size": adaptation.batch_size,
            "test.batch_size": adaptation.batch_size,
            "test.evaluate": False,
            "data.workers": adaptation.num_workers,
            "data.save_dir": adaptation.folder,
            "selcon.method": adaptation.method,
            "selcon.checkpoint_period": adaptation.checkpoint_period,
            "selcon.keep_checkpoints": 0,
            "selcon.keep_best_by": "none",  # the adaptation scores all checkpoints
        }
        if adaptation.device != "auto":
            found |= self._of_device(adaptation.device)
        return found | (_of_foreign(adaptation) if adaptation.foreign else {})

    def checkpoints(self, folder: str | Path, epochs: int) -> list[tuple[int, Path]]:
        """List the checkpoints of a run by number of epochs trained."""
        files = list_checkpoints(Path(folder) / "model")
        return [(checkpoint_epoch(file), file) for file in files]


def _of_foreign(adaptation: Adaptation) -> dict[str, Any]:
    """Return the settings that keep the feature of a network from another training."""
    width = feature_layer_width(read_state_dict(Path(adaptation.weights).expanduser()))
    is_own = not adaptation.backbone.startswith(TIMM_PREFIX)
    return {
        "selcon.feature": "model" if is_own else "head",
        "selcon.num_parts": 0,
        **{f"selcon.clustering.{k}": value for k, value in adaptation.clustering.items()},
        "selcon.embedding_dim": width,
        "selcon.project_global": width > 0,
        "selcon.last_stride": 2,
    }


def _comparable_key(key: str) -> str:
    for node, name in _COMPARABLE_NODES.items():
        if key.startswith(node):
            return name + key.removeprefix(node).upper()
    return _COMPARABLE_KEYS.get(key, key)

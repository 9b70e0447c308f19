"""How ``selcon adapt`` speaks to each host: keys of its config, files of its runs."""

from __future__ import annotations

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from selcon_plugin.config.checks import read_config_file
from selcon_plugin.config.keys import own_method_options
from selcon_plugin.hosts import host_of, load_config, train_config
from selcon_plugin.io.atomic import save_atomically, write_atomically
from selcon_plugin.methods import method_names
from selcon_plugin.models.pretrained import read_state_dict

__all__ = ["AdaptHost", "find_host"]

_BANKS = "method."
_DEFAULT_METHOD = "SelConCluster"


class AdaptHost(ABC):
    """A host in which a network is adapted.

    Args:
        config_file: Config of the given network; empty for the host's defaults.
    """

    name: str

    def __init__(self, config_file: str) -> None:
        self.config_file = config_file

    def load_config(self, options: Sequence[str]) -> Any:
        """Read the config of the given network.

        Args:
            options: The user's ``KEY VALUE`` pairs.

        Returns:
            Complete config.
        """
        return load_config(
            self.config_file, [*self._of_network(), *options], host=self.name
        )

    def training_config(
        self,
        *,
        images: str,
        camera_pattern: str,
        settings: Mapping[str, Any],
        options: Sequence[str],
    ) -> Any:
        """Make the config of the training.

        Args:
            images: Folder of images.
            camera_pattern: How to find their cameras.
            settings: By name; see ``selcon_plugin.workflows.adapt``.
            options: The user's ``KEY VALUE`` pairs, which come last.

        Returns:
            Complete config.
        """
        own = self._own_method()
        method = settings["method"] or own or _DEFAULT_METHOD
        words = [*self._of_network(), *self._of_training({**settings, "method": method})]
        if not own:
            words += self._of_strangers(settings)
        file = self.config_file
        if own and method != own:
            file = self._without_method_options(Path(settings["folder"]))
        return load_config(
            file,
            [*words, *options],
            images=images,
            camera_pattern=camera_pattern,
            host=self.name,
        )

    def _own_method(self) -> str:
        """Return the method that the config trains with; "" for another kind of config."""
        if not self.config_file:
            return ""
        node = yaml.safe_load(self.load_config([]).dump())
        content = read_config_file(self.config_file)
        for name in self._node:
            if name not in content:
                return ""
            node, content = node[name], content[name]
        return str(node[self._spell("method")])

    def _without_method_options(self, folder: Path) -> str:
        """Write the config anew, without the options of the method that it names."""
        content = yaml.safe_load(self.load_config([]).dump())
        node = content
        for name in self._node:
            node = node[name]
        for method in method_names():
            for option in own_method_options(method):
                node.pop(self._spell(option), None)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "base.yaml"
        write_atomically(yaml.safe_dump(content), file)
        return str(file)

    def train(self, cfg: Any) -> None:
        """Train, or go on with a training that was stopped."""
        train_config(cfg, resume=True)

    @abstractmethod
    def checkpoints(self, folder: Path, epochs: int) -> list[tuple[int, Path]]:
        """List the checkpoints of a run.

        Args:
            folder: Its folder.
            epochs: Its epochs in all.

        Returns:
            Epochs done and file, by rising epochs.
        """

    def write_network(self, file: str | Path, target: Path, *, trained: bool) -> None:
        """Write a network alone, without what belongs to the run that made it.

        Args:
            file: Checkpoint.
            target: File to write or replace.
            trained: Whether it is a checkpoint of the training, else it stays as it is.
        """
        if not trained:
            shutil.copyfile(Path(file).expanduser(), target)
            return
        state = {
            name.removeprefix("module."): tensor
            for name, tensor in read_state_dict(Path(file)).items()
        }
        network = {k: v for k, v in state.items() if not k.startswith(_BANKS)}
        save_atomically({self._state_key: network}, target)

    _state_key: str
    _node: tuple[str, ...]  # of the config, that holds the plugin's keys
    _spell: Callable[[str], str]

    def _of_network(self) -> list[str]:
        return []

    @abstractmethod
    def _of_training(self, settings: Mapping[str, Any]) -> list[str]:
        """Return what is set for each training."""

    @abstractmethod
    def _of_strangers(self, settings: Mapping[str, Any]) -> list[str]:
        """Return what is set for networks that this plugin did not train."""


class _Torchreid(AdaptHost):
    name = "torchreid"
    _state_key = "state_dict"
    _node = ("selcon",)
    _spell = staticmethod(str.lower)
    _checkpoint = re.compile(r"model\.pth\.tar-(\d+)")

    def __init__(self, config_file: str, backbone: str, weights: str) -> None:
        super().__init__(config_file)
        self._backbone = backbone
        self._weights = weights

    def _of_network(self) -> list[str]:
        # A config of its own is none of a run: torchreid's defaults, without downloads. The
        # package's config for folders, which has a head to train from scratch, steps back.
        named: list[str] = []
        if self._backbone:
            keys = {
                "model.name": self._backbone,
                "selcon.pool": "avg",
                "selcon.bn_neck": False,
                "data.transforms": ["random_flip"],
            }
            named = _as_options(keys)
        cpu = [] if torch.cuda.is_available() else ["use_gpu", "False"]
        return [*named, "model.pretrained", "False", "selcon.weights", "''", *cpu]

    def _of_training(self, settings: Mapping[str, Any]) -> list[str]:
        keys = {
            "model.load_weights": settings["weights"],
            "model.resume": "",
            "train.optim": "adam",
            "train.lr": settings["learning_rate"],
            "train.max_epoch": settings["epochs"],
            "train.start_epoch": 0,
            "train.lr_scheduler": "single_step",
            "train.stepsize": [settings["epochs"] + 1],  # constant
            "train.batch_size": settings["batch_size"],
            "test.batch_size": settings["batch_size"],
            "test.evaluate": False,
            "data.workers": settings["num_workers"],
            "data.save_dir": settings["folder"],
            "selcon.method": settings["method"],
            "selcon.checkpoint_period": settings["checkpoint_period"],
            "selcon.keep_checkpoints": 0,
            "selcon.keep_best_by": "none",  # all checkpoints are measured
        }
        if settings["device"] == "cpu":
            keys["use_gpu"] = False
        return _as_options(keys)

    def _of_strangers(self, settings: Mapping[str, Any]) -> list[str]:
        from selcon_plugin.torchreid_ext.models import feature_layer_width

        keys: dict[str, Any] = {
            "selcon.num_parts": 0,
            "selcon.clustering.labeler": "DBSCAN",
        }
        for name, value in settings["clustering"].items():
            keys[f"selcon.clustering.{name}"] = value
        width = feature_layer_width(read_state_dict(Path(self._weights).expanduser()))
        keys |= {
            "selcon.embedding_dim": width,
            "selcon.project_global": width > 0,
            "selcon.last_stride": 2,
        }
        return _as_options(keys)

    def checkpoints(self, folder: Path, epochs: int) -> list[tuple[int, Path]]:
        found = [
            (int(match[1]), file)
            for file in (folder / "model").glob("model.pth.tar-*")
            if (match := self._checkpoint.fullmatch(file.name))
        ]
        return sorted(found)


class _FastReID(AdaptHost):
    name = "fastreid"
    _state_key = "model"
    _node = ("MODEL", "SELCON")
    _spell = staticmethod(str.upper)
    _checkpoint = re.compile(r"model_(\d+)\.pth")

    def _of_training(self, settings: Mapping[str, Any]) -> list[str]:
        keys = {
            "MODEL.META_ARCHITECTURE": "SelCon",
            "MODEL.WEIGHTS": settings["weights"],
            "MODEL.BACKBONE.PRETRAIN": False,
            "MODEL.SELCON.METHOD": settings["method"],
            "MODEL.SELCON.KEEP_CHECKPOINTS": 0,
            "MODEL.SELCON.KEEP_BEST_BY": "none",  # all checkpoints are measured
            "SOLVER.OPT": "Adam",
            "SOLVER.BASE_LR": settings["learning_rate"],
            "SOLVER.MAX_EPOCH": settings["epochs"],
            "SOLVER.SCHED": "MultiStepLR",
            "SOLVER.STEPS": [settings["epochs"] + 1],  # constant
            "SOLVER.WARMUP_ITERS": 0,
            "SOLVER.DELAY_EPOCHS": 0,
            "SOLVER.IMS_PER_BATCH": settings["batch_size"],
            "SOLVER.CHECKPOINT_PERIOD": settings["checkpoint_period"],
            "TEST.IMS_PER_BATCH": settings["batch_size"],
            "DATALOADER.NUM_WORKERS": settings["num_workers"],
            "OUTPUT_DIR": settings["folder"],
        }
        if settings["device"] != "auto":
            keys["MODEL.DEVICE"] = settings["device"]
        return _as_options(keys)

    def _of_strangers(self, settings: Mapping[str, Any]) -> list[str]:
        keys: dict[str, Any] = {
            "MODEL.SELCON.NUM_PARTS": 0,
            "MODEL.SELCON.PROJECT_GLOBAL": False,
            "MODEL.SELCON.CLUSTERING.LABELER": "DBSCAN",
        }
        for name, value in settings["clustering"].items():
            keys[f"MODEL.SELCON.CLUSTERING.{name.upper()}"] = value
        return _as_options(keys)

    def checkpoints(self, folder: Path, epochs: int) -> list[tuple[int, Path]]:
        found = [
            (int(match[1]) + 1, file)
            for file in folder.glob("model_*.pth")
            if (match := self._checkpoint.fullmatch(file.name))
        ]
        final = folder / "model_final.pth"
        return [*sorted(found), *([(epochs, final)] if final.exists() else [])]


def find_host(weights: str, config_file: str, backbone: str) -> AdaptHost:
    """Find the host that a network is of.

    Args:
        weights: Its checkpoint.
        config_file: Its config; empty for the one beside it.
        backbone: torchreid's name of the model, for weights without a config.

    Returns:
        The host.

    Raises:
        ValueError: If there is no config and no name, or both.
    """
    from selcon_plugin.inference.embedder import find_config

    if backbone and config_file:
        raise ValueError("the config names the backbone: leave out one of the two")
    if backbone:
        return _Torchreid("", backbone, weights)
    config_file = config_file or find_config(weights)
    if not config_file:
        raise ValueError(
            f"there is no config.yaml beside {weights}: name the config that it was "
            "trained with (--config-file), or for plain weights the model (--backbone "
            "osnet_x0_25)"
        )
    if host_of(config_file) == "torchreid":
        return _Torchreid(config_file, "", weights)
    return _FastReID(config_file)


def _as_options(keys: Mapping[str, Any]) -> list[str]:
    """Write values as words of a command line."""
    # As Python literals: else the folder "2024" would be taken for a number.
    return [word for key, value in keys.items() for word in (key, repr(value))]

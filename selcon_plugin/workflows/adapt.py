"""Adapt a trained network to a folder of images, and keep the best checkpoint.

The network trains on the images without labels. Before the training and at each checkpoint,
:func:`~selcon_plugin.metrics.label_free.label_free_quality` scores its features of the same
images. The result is the checkpoint with the best score; the given network is one of the
candidates, so the score of the result is never worse than that of the given network.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selcon_plugin.config.checks import (
    check_name,
    check_network_file,
    flatten_config,
    value_of,
)
from selcon_plugin.config.files import read_config_file
from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import Adaptation
from selcon_plugin.config.keys import own_method_options
from selcon_plugin.datasets import ImageItem, read_image_folder
from selcon_plugin.features import BadFeaturesError
from selcon_plugin.hosts import TrainedNetwork, find_network
from selcon_plugin.inference.embedder import Embedder, choose_device
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.io.atomic import replacing, write_atomically
from selcon_plugin.io.integrity import file_checksum
from selcon_plugin.io.output_files import check_output_apart, check_output_folder
from selcon_plugin.io.streams import is_terminal
from selcon_plugin.methods import method_names
from selcon_plugin.metrics.label_free import LabelFreeQuality, label_free_quality
from selcon_plugin.models.pretrained import is_packaged
from selcon_plugin.runs.folder import owned_run
from selcon_plugin.workflows.adapt_record import (
    ADAPTED_FILE,
    TRAINING_FOLDER,
    Adapted,
    AdaptRecord,
    Candidate,
)
from selcon_plugin.workflows.cluster_folder import fingerprint, image_key
from selcon_plugin.workflows.folder_clusters import default_options
from selcon_plugin.workflows.train import train

__all__ = ["AdaptSettings", "Adapted", "Candidate", "adapt"]

CONFIG_FILE, RECORD_FILE = "config.yaml", "adapt.json"
_LABELER = "Agglomerative"  # of networks whose config names none
_DEFAULT_METHOD = "SelConCluster"
# Scoring one checkpoint takes as long as one clustering of the training images.
_CHECKPOINTS = 5


@dataclass(frozen=True)
class AdaptSettings:
    """Settings of an adaptation.

    Attributes:
        weights: Checkpoint of this plugin, FastReID or torchreid, or plain weights.
        images: Folder of images.
        config_file: Config of the checkpoint; empty for ``config.yaml`` in its folder.
        backbone: Model name in torchreid, for weights without a config.
        method: Registered name of the training method; empty for the method of the config
            if it names one, else SelConCluster.
        epochs: Number of epochs to train, at least 1.
        learning_rate: Learning rate of the optimizer Adam.
        camera_pattern: How to find the camera in a file's path, as for ``selcon train``.
        batch_size: Images per training step, and per batch of the feature extraction.
        num_workers: Number of processes that read images.
        device: ``"auto"`` for a GPU if there is one, or a device of PyTorch.
        max_unreadable_ratio: Fraction of the images that may be unreadable; None for that
            of the config.
        options: ``KEY VALUE`` pairs of the host's config; they override all others.
        images_per_person: About how many images show the same person; None to estimate it.
    """

    weights: str
    images: str
    config_file: str = ""
    backbone: str = ""
    method: str = ""
    epochs: int = 10
    learning_rate: float = 3.5e-4
    camera_pattern: str = ""
    batch_size: int = 64
    num_workers: int = 0
    device: str = "auto"
    max_unreadable_ratio: float | None = None
    options: tuple[str, ...] = ()
    images_per_person: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be a whole number >= {least}, got {getattr(self, name)}"
                )
        if not (0 < self.learning_rate < math.inf):
            raise ValueError(
                f"learning_rate must be a number > 0, got {self.learning_rate}"
            )

    @property
    def checkpoint_period(self) -> int:
        """Return the epochs between scored checkpoints, of which there are at most five."""
        return math.ceil(self.epochs / _CHECKPOINTS)


def adapt(
    settings: AdaptSettings,
    output: str | Path,
    *,
    echo: Callable[[str], None] = lambda _: None,
) -> Adapted:
    """Adapt a network to a folder of images.

    The function writes the network to ``adapted.pth``, its config to ``config.yaml`` and
    the scores to ``adapt.json``. The same call resumes an interrupted adaptation.

    Args:
        settings: Settings of the adaptation.
        output: Folder to write to.
        echo: Receives lines for the user.

    Returns:
        The best network and the scores of all candidates.

    Raises:
        ValueError: If a setting is illegal, or the folder contains another adaptation.
        FileNotFoundError: If a file or folder does not exist.
        RunStopped: If a signal stopped the training; it is a ``SystemExit``.
    """  # noqa: DOC502  (raised by the functions called here)
    if is_packaged(settings.weights):
        raise ValueError(
            f"--weights {settings.weights} is an ImageNet network, which has not learned "
            "persons: train one that starts from it with selcon train --images"
        )
    check_network_file("--weights", settings.weights)
    if settings.method:
        check_name("--method", settings.method, method_names())
    check_output_folder("--output", str(output))
    check_output_apart(output, settings.weights, name="--output")
    output = Path(output)
    items = read_image_folder(settings.images, camera_pattern=settings.camera_pattern)
    network = find_network(settings.weights, settings.config_file, settings.backbone)
    given_config = network.load_config((*_ratio(network.host, settings), *settings.options))
    # It is checked before any image is measured.
    cfg = training_config(network, settings, output / TRAINING_FOLDER)
    network.host.check_trainable(cfg)
    with owned_run(output):
        contents = {
            "image_list": fingerprint(items),
            "image_content": image_key(items),
            "weights_content": file_checksum(Path(settings.weights).expanduser()),
        }
        record = AdaptRecord.open(output / RECORD_FILE, settings, contents)
        return _adapt(network.host, items, settings, record, given_config, cfg, echo)


def _adapt(
    host: Host,
    items: Sequence[ImageItem],
    settings: AdaptSettings,
    record: AdaptRecord,
    given_config: Any,
    cfg: Any,
    echo: Callable[[str], None],
) -> Adapted:
    output = record.folder
    if record.done:
        if record.result_is_whole():
            echo(f"{output} contains this adaptation already: nothing to do")
        else:
            echo(f"{output / ADAPTED_FILE} is missing or damaged: it is written again")
            _write_best(host, record, output, given_config, cfg)
            record.finish()
        return record.result()
    measure = _Measure(host, items, settings, record, echo)
    measure(0, settings.weights, given_config)
    try:
        train(host, cfg, resume=True)
    except FloatingPointError as error:
        echo(f"Training stopped early: {error}")
    for epochs, file in host.checkpoints(output / TRAINING_FOLDER, settings.epochs):
        measure(epochs, file, cfg)
    _write_best(host, record, output, given_config, cfg)
    result = record.finish()
    _report(result, echo)
    return result


def training_config(network: TrainedNetwork, settings: AdaptSettings, folder: Path) -> Any:
    """Build the config of the training.

    Args:
        network: The given network.
        settings: Settings of the adaptation.
        folder: Folder of the run.

    Returns:
        Complete config of the network with the training settings of ``settings``. A
        network that the plugin did not train keeps its head, and its features are
        clustered by the labeler that suits any number of images per person.
    """
    own_method = _own_method(network)
    method = settings.method or own_method or _DEFAULT_METHOD
    adaptation = Adaptation(
        weights=str(network.weights),
        method=method,
        folder=str(folder),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        checkpoint_period=settings.checkpoint_period,
        device=settings.device,
        clustering={
            "labeler": _LABELER,
            **default_options(_LABELER),
            "center_cameras": True,
        },
        foreign=not own_method,
        backbone=network.host.describe_network(flatten_config(network.load_config()))[0],
    )
    with tempfile.TemporaryDirectory(prefix="selcon-") as scratch:
        file = network.config_file
        if own_method and method != own_method:
            file = _without_method_options(network, Path(scratch))
        return _load_training_config(network, settings, adaptation, file)


def _load_training_config(
    network: TrainedNetwork, settings: AdaptSettings, adaptation: Adaptation, file: str
) -> Any:
    host = network.host
    return host.load_config(
        file,
        (*_ratio(host, settings), *settings.options),
        overrides={
            **network.overrides,
            **host.adaptation_overrides(adaptation),
            **host.overrides(clustering=_hint(settings)),
        },
        images=settings.images,
        camera_pattern=settings.camera_pattern,
    )


def _hint(settings: AdaptSettings) -> dict[str, float]:
    number = settings.images_per_person
    return {} if number is None else {"images_per_person": number}


def _ratio_key(host: Host) -> str:
    return f"{host.keys.path}.{host.keys.case('max_unreadable_ratio')}"


def _ratio(host: Host, settings: AdaptSettings) -> tuple[str, ...]:
    """Return the setting for unreadable images as an option of the host's config."""
    ratio = settings.max_unreadable_ratio
    return () if ratio is None else (_ratio_key(host), str(ratio))


def _plugin_node(host: Host, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the plugin's node of a config, or None if the config has none."""
    node: Any = content
    for name in host.keys.path.split("."):
        if name not in node:
            return None
        node = node[name]
    found: dict[str, Any] = node
    return found


def _effective_content(network: TrainedNetwork) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(network.load_config().dump())
    return content


def _own_method(network: TrainedNetwork) -> str:
    """Return the training method of the config; "" if the plugin did not write it."""
    host, file = network.host, network.config_file
    if not file or _plugin_node(host, read_config_file(file)) is None:
        return ""
    node = _plugin_node(host, _effective_content(network))
    assert node is not None
    return str(node[host.keys.case("method")])


def _without_method_options(network: TrainedNetwork, folder: Path) -> str:
    """Write a copy of the config without the options of individual methods."""
    content = _effective_content(network)
    node = _plugin_node(network.host, content)
    assert node is not None
    for method in method_names():
        for option in own_method_options(method):
            node.pop(network.host.keys.case(option), None)
    file = folder / "base.yaml"
    write_atomically(yaml.safe_dump(content), file)
    return str(file)


class _Measure:
    """The scoring of networks; it skips those that the record contains already."""

    def __init__(
        self,
        host: Host,
        items: Sequence[ImageItem],
        settings: AdaptSettings,
        record: AdaptRecord,
        echo: Callable[[str], None],
    ) -> None:
        self._host = host
        self._items = items
        self._settings = settings
        self._record = record
        self._echo = echo
        self._paths: tuple[str, ...] | None = None

    def __call__(self, epochs: int, file: str | Path, cfg: Any) -> None:
        """Score a checkpoint and record the result.

        Args:
            epochs: Epochs of adaptation.
            file: The checkpoint.
            cfg: Config of the checkpoint.
        """
        known = {candidate.epochs: candidate for candidate in self._record.candidates}
        if epochs in known:
            return
        try:
            found = self._features(file, cfg)
            quality = label_free_quality(
                found.features,
                found.camids,
                images_per_person=self._settings.images_per_person,
            )
        except (FloatingPointError, BadFeaturesError):  # e.g. weights that are not finite
            quality = None
        # The path is absolute, as a later call may have another working directory.
        place = str(Path(file).expanduser().absolute())
        self._record.add(Candidate(epochs, place, quality))
        name = f"after {epochs} epochs" if epochs else "given network"
        self._echo(f"{name}: {_summary(quality)}")

    def _features(self, file: str | Path, cfg: Any) -> FolderFeatures:
        device = choose_device(self._settings.device)
        found = Embedder(self._host.load_network(cfg, file, device)).embed_items(
            self._items,
            batch_size=self._settings.batch_size,
            num_workers=self._settings.num_workers,
            max_unreadable_ratio=value_of(cfg, _ratio_key(self._host)),
            show_progress=is_terminal(sys.stderr),
        )
        if self._paths not in (None, found.paths):
            raise ValueError(
                f"the images in {self._settings.images} changed during the adaptation: do "
                "not modify the folder, and start over with another --output"
            )
        self._paths = found.paths
        return found


def _summary(quality: LabelFreeQuality | None) -> str:
    if quality is None:
        return "unusable features, left out"
    if quality.collapse:
        return f"quality 0: the features are collapsed, {quality.collapse}"
    return (
        f"quality {quality.value:.4f} (silhouette; {quality.num_clusters} clusters, "
        f"{100 * quality.outlier_ratio:.0f} % outliers)"
    )


def _report(result: Adapted, echo: Callable[[str], None]) -> None:
    before, best = result.before.value, result.best.value
    if result.improved:
        echo(
            f"The best checkpoint is that after {result.best.epochs} epochs, quality "
            f"{before:.4f} -> {best:.4f}: {result.file}"
        )
    else:
        echo(
            f"No checkpoint is better than the given network, quality {before:.4f}, which "
            f"is kept as {result.file}. Try a lower learning rate, or other settings"
        )


def _write_best(
    host: Host, record: AdaptRecord, output: Path, given_config: Any, trained_config: Any
) -> None:
    best, cfg = record.best, trained_config
    if not Path(best.file).expanduser().is_file():
        raise FileNotFoundError(
            f"the best checkpoint {best.file} is gone: restore it, or remove "
            f"{record.file} to start over"
        )
    if best.epochs:
        host.write_network(best.file, output / ADAPTED_FILE)
    elif best.quality is None:
        raise ValueError("the given network's features contain NaN or infinity")
    else:
        given = Path(best.file).expanduser()
        with given.open("rb") as source, replacing(output / ADAPTED_FILE) as target:
            shutil.copyfileobj(source, target)
        cfg = given_config
    write_atomically(cfg.dump(), output / CONFIG_FILE)

"""Export of trained networks as plain checkpoints of their host, which needs no plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from selcon_plugin.config.host_data import PlainNetwork
from selcon_plugin.hosts import TrainedNetwork
from selcon_plugin.inference.export import ExportCheck, ExportMismatchError
from selcon_plugin.io.atomic import make_folder, save_atomically, write_atomically

__all__ = ["PlainExport", "export_plain"]

CHECKPOINT_FILE, CONFIG_FILE = "model.pth", "config.yaml"
# The bias that moves into the normalization is rounded.
_MAX_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class PlainExport:
    """Files of an exported network.

    Attributes:
        weights: The checkpoint.
        config: The host's config, which names it.
        plain: The network.
        check: Its comparison with the trained network, or the exported branch of it.
        measured: mAP in percent of the whole network and of the exported branch, by test
            set; empty for a whole network.
        unmeasured: Why there is none.
    """

    weights: Path
    config: Path
    plain: PlainNetwork
    check: ExportCheck
    measured: Mapping[str, tuple[float, float]]
    unmeasured: str


def export_plain(
    trained: TrainedNetwork,
    host: str,
    folder: str | Path,
    *,
    crops: Sequence[Image.Image],
    global_only: bool = False,
    options: Sequence[str] = (),
) -> PlainExport:
    """Write a network as a checkpoint and a config that its host uses by itself.

    The host's own model is built and compared with the trained one before it is written.

    Args:
        trained: The trained network.
        host: Host whose form is requested.
        folder: Folder to write to.
        crops: Images for the comparison.
        global_only: Whether to leave out parts that the host does not have.
        options: ``KEY VALUE`` pairs that change the config of the network.

    Returns:
        Files and comparison.

    Raises:
        ExportMismatchError: If the features differ; nothing is written.
        ValueError: If the network belongs to another host, or its host cannot express it.
    """
    if trained.host.name != host:
        raise ValueError(
            f"{trained.weights} is a network of {trained.host.title}: use "
            f"--{trained.host.name} instead of --{host}"
        )
    cfg = trained.load_config(options)
    plain = trained.host.plain_network(cfg, trained.weights, global_only=global_only)
    pixels = np.stack([plain.network.preprocessing.resize(crop) for crop in crops])
    check = ExportCheck.of(
        plain.trained.embed_pixels(pixels), plain.network.embed_pixels(pixels)
    )
    if check.max_difference > _MAX_DIFFERENCE:
        raise ExportMismatchError(
            f"{folder} is not written: on {check.num_images} crops the host's own model "
            f"differs by up to {check.max_difference:.2e}, more than {_MAX_DIFFERENCE:g}"
        )
    measured, unmeasured = ({}, "") if plain.whole else _measure(trained, cfg, plain)
    place = make_folder(folder).absolute()
    config = plain.config.clone()
    config.defrost()
    files = {plain.weights_key: CHECKPOINT_FILE, plain.output_key: "run"}
    for key, name in files.items():
        config.merge_from_list([key, str(place / name)])
    save_atomically(plain.checkpoint, place / CHECKPOINT_FILE)
    write_atomically(config.dump(), place / CONFIG_FILE)
    return PlainExport(
        place / CHECKPOINT_FILE,
        place / CONFIG_FILE,
        plain,
        check,
        measured,
        unmeasured,
    )


def _measure(
    trained: TrainedNetwork, cfg: Any, plain: PlainNetwork
) -> tuple[dict[str, tuple[float, float]], str]:
    """Return the mAP of the whole network and of the exported branch, or why there is none.

    The test images may not be on this machine.
    """
    host = trained.host
    try:
        whole = host.load_network(cfg, trained.weights, torch.device("cpu"))
        before, now = host.measure(cfg, whole), host.measure(cfg, plain.network)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        return {}, (str(error).strip() or type(error).__name__).splitlines()[0]
    found = {name: (before[name]["mAP"], now[name]["mAP"]) for name in before}
    return found, "" if found else "the config names no test set"

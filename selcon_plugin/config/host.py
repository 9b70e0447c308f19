"""The interface of a host: what a workflow asks of FastReID, of torchreid, or of a third.

Settings go in by neutral names and come out as keys of the host's config; runs, networks
and files come back in one form. A host is one class in one folder, and a line in
``selcon_plugin.hosts``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from selcon_plugin.config.checks import flatten_config, read_config_file
from selcon_plugin.config.demo import Demo
from selcon_plugin.config.help import ConfigHelp
from selcon_plugin.config.host_data import (
    Adaptation,
    NetworkSettings,
    Processes,
    RunFiles,
    RunKeys,
    RunResult,
    keys_in,
)
from selcon_plugin.config.keys import ConfigKeys
from selcon_plugin.config.loading import (
    builtin_config,
    merge_file,
    merge_options,
    merge_overrides,
)
from selcon_plugin.io.atomic import save_atomically
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.pretrained import read_state_dict

# Prefix of what a method remembers, in a checkpoint.
_METHOD_STATE = "method."


class Host(ABC):
    """A framework that trains.

    Attributes:
        name: Name of its package.
        title: Name for people.
        keys: The plugin's keys in its config.
        run_keys: Its own keys of what every host has.
        run_files: How far a run of it is.
        folder_config: The package's config for a folder of images; empty for the defaults.
        checkpoint_key: Entry of a checkpoint that holds the network.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    keys: ClassVar[ConfigKeys]
    run_keys: ClassVar[RunKeys]
    run_files: ClassVar[RunFiles]
    folder_config: ClassVar[str]
    checkpoint_key: ClassVar[str]

    # --- configs --------------------------------------------------------------------------

    def owns(self, keys: Iterable[str]) -> bool:
        """Tell by their case whether keys are of this host's config.

        Args:
            keys: Full keys, or keys of the top level.

        Returns:
            Whether all are; False for no keys at all.
        """
        return keys_in(self.keys.case)(keys)

    @abstractmethod
    def default_config(self) -> Any:
        """Return the host's default config with the plugin's keys, not frozen."""

    @abstractmethod
    def complete_config(self, cfg: Any) -> Any:
        """Return a checked copy of a config with everything that a run needs.

        Raises:
            ValueError: If a value is illegal; names key, value and what is legal.
        """

    def load_config(
        self,
        file: str = "",
        options: Sequence[str] = (),
        *,
        overrides: Mapping[str, Any] | None = None,
        images: str = "",
        camera_pattern: str = "",
    ) -> Any:
        """Read a config file and settings into a complete config.

        Args:
            file: Config of this host; empty for its defaults, or with ``images`` for the
                package's own.
            options: ``KEY VALUE`` pairs as on a command line; they come last.
            overrides: Values by full key, merged before ``options``.
            images: Folder of images to train on.
            camera_pattern: How to find their cameras.

        Returns:
            Complete, frozen config.

        Raises:
            ValueError: If the file cannot be read, or a key or a value is wrong.
            FileNotFoundError: If the file does not exist.
        """  # noqa: DOC502  (raised by the functions called here)
        if file:
            read_config_file(file)
        elif images and self.folder_config:
            file = builtin_config(self.folder_config)
        cfg = self.default_config()
        if file:
            merge_file(cfg, self.keys, file)
        merge_overrides(cfg, self.keys, overrides or {})
        merge_options(cfg, self.keys, options)
        # Set as they are: a config option would be read as a Python literal.
        self._name_images(cfg, images, camera_pattern)
        cfg = self.complete_config(cfg)
        cfg.freeze()
        return cfg

    @abstractmethod
    def _name_images(self, cfg: Any, images: str, camera_pattern: str) -> None:
        """Put a folder of images in the place of the data sets; "" changes nothing."""

    def overrides(
        self,
        *,
        network: NetworkSettings | None = None,
        device: str = "auto",
        dataset: str = "",
        options: Mapping[str, Any] | None = None,
        clustering: Mapping[str, Any] | None = None,
        **run: Any,
    ) -> dict[str, Any]:
        """Turn settings by neutral names into values by full keys.

        Args:
            network: The network to train.
            device: ``"auto"`` leaves that of the config.
            dataset: Data set to train and to test on.
            options: The plugin's options of run and method, such as ``temperature``.
            clustering: The plugin's options of the clustering and its labeler.
            **run: Values by the names of :class:`RunKeys`, and ``seed``; None leaves that
                of the config.

        Returns:
            Values for :meth:`load_config`.
        """
        options = dict(options or {})
        if run.get("seed") is not None:
            options["seed"] = run.pop("seed")
        found = {getattr(self.run_keys, k): v for k, v in run.items() if v is not None}
        path, case = self.keys.path, self.keys.case
        found |= {f"{path}.{case(name)}": value for name, value in options.items()}
        path = f"{path}.{self.keys.clustering_key}"
        found |= {f"{path}.{case(k)}": value for k, value in (clustering or {}).items()}
        found |= self._of_network(network) if network else {}
        found |= self._of_device(device) if device != "auto" else {}
        found |= self._of_dataset(dataset) if dataset else {}
        return found

    @abstractmethod
    def _of_network(self, network: NetworkSettings) -> dict[str, Any]:
        """Return what a network is set by."""

    @abstractmethod
    def _of_device(self, device: str) -> dict[str, Any]:
        """Return what a device is set by."""

    @abstractmethod
    def _of_dataset(self, name: str) -> dict[str, Any]:
        """Return what a data set, to train and to test on, is set by."""

    @abstractmethod
    def help(self) -> ConfigHelp:
        """Return what is known of the config's keys."""

    @abstractmethod
    def default_values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults, with those of the method of another config, by full keys.

        Args:
            settings: The other config, by full keys.
        """

    def comparable_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Name settings as the default host does, where it has the same.

        Args:
            settings: Effective values of this host by full keys.

        Returns:
            The same values, some by other keys.
        """
        return dict(settings)

    @abstractmethod
    def check_trainable(self, cfg: Any) -> None:
        """Refuse what could not be trained, before anything is built.

        Raises:
            ValueError: If the config would train on identities, or names a data set that
                is unknown.
        """

    # --- runs -----------------------------------------------------------------------------

    @abstractmethod
    def train(self, cfg: Any, *, resume: bool = False, source: str = "") -> RunResult:
        """Train in this process, one of possibly several, and write ``results.json``.

        Args:
            cfg: Complete config.
            resume: Whether to resume from the last checkpoint in the folder, if there is
                one.
            source: File that the config came from, for the log.
        """

    @abstractmethod
    def evaluate(self, cfg: Any, *, source: str = "") -> Mapping[str, Any]:
        """Evaluate the weights that a config names.

        Args:
            cfg: Complete config.
            source: File that the config came from, for the log.

        Returns:
            Metrics by test set.

        Raises:
            ValueError: If there are no weights, or there is nothing to evaluate on.
        """

    def check_expected(self, cfg: Any, result: RunResult) -> None:  # noqa: B027
        """Compare the metrics with those that the config expects, where a host can."""

    def launch(
        self,
        main: Callable[..., Any],
        args: tuple[Any, ...],
        processes: Processes,
        *,
        training: Any = None,
    ) -> None:
        """Call a function in all processes of a run.

        Args:
            main: Importable by name: a process of its own imports it.
            args: Its arguments.
            processes: How many there are.
            training: Config of the training, for checks before any process starts; None for
                an evaluation.

        Raises:
            ValueError: If the host trains in one process and there are to be several.
            ProcessFailure: If one of several processes failed.
        """  # noqa: DOC502  (raised by those that start several)
        if processes.per_machine > 1 or processes.num_machines > 1:
            raise ValueError(self._one_process())
        main(*args)

    def _one_process(self) -> str:
        return (
            f"{self.title} trains in one process: leave out --num-gpus and --num-machines"
        )

    def demo(self, cfg: Any) -> Demo:
        """Return this host's steps of ``selcon demo``.

        Raises:
            ValueError: If it has none.
        """
        raise ValueError(f"there is no demo in {self.title}")

    # --- trained networks -----------------------------------------------------------------

    @abstractmethod
    def load_network(
        self, cfg: Any, weights: str | Path, device: torch.device
    ) -> InferenceNetwork:
        """Build the network of a config and load its weights.

        Args:
            cfg: Complete config; see :meth:`inference_overrides`.
            weights: Checkpoint that was trained with it.
            device: Where to compute.

        Raises:
            ValueError: If the file holds another network.
            FileNotFoundError: If there is no file.
        """

    def inference_overrides(self, backbone: str = "") -> dict[str, Any]:
        """Return what is set to load a trained network: no download, no missing GPU.

        Args:
            backbone: Name of the model, for plain weights without a config.

        Raises:
            ValueError: If the host builds no models by name.
        """
        if backbone:
            raise ValueError(f"{self.title} loads no weights without a config")
        return {}

    @abstractmethod
    def adaptation_overrides(self, adaptation: Adaptation) -> dict[str, Any]:
        """Return what is set to train a network further."""

    @abstractmethod
    def checkpoints(self, folder: str | Path, epochs: int) -> list[tuple[int, Path]]:
        """List the checkpoints of a run.

        Args:
            folder: Its folder.
            epochs: Its epochs in all.

        Returns:
            Epochs trained and file, by rising epochs.
        """

    def write_network(self, checkpoint: str | Path, target: str | Path) -> None:
        """Write the network of a run's checkpoint, without what belongs to the run.

        Args:
            checkpoint: The checkpoint.
            target: File to write or replace.
        """
        state = {
            name.removeprefix("module."): tensor
            for name, tensor in read_state_dict(Path(checkpoint)).items()
        }
        network = {k: v for k, v in state.items() if not k.startswith(_METHOD_STATE)}
        save_atomically({self.checkpoint_key: network}, target)

    def extract(self, cfg: Any, output: str | Path) -> tuple[int, int]:
        """Write the features of a config's images, by the weights that it names, to a file.

        Args:
            cfg: Complete config.
            output: File to write: arrays ``paths``, ``camids`` and ``features``; the number
                of images and the length of a feature are returned.

        Raises:
            ValueError: If the host cannot.
        """
        raise ValueError(
            f"{self.title}'s config cannot name the network here: use --weights FILE"
        )

    def _config_help(self, **options: Any) -> ConfigHelp:
        defaults = flatten_config(self.default_config())
        return ConfigHelp(self.keys, self.title, defaults, **options)

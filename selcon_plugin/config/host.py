"""Interface between the workflows and a host, such as FastReID or torchreid.

It translates settings with host-independent names into keys of the host's config, and
returns runs, networks and files in one form. A host consists of one class in one folder,
and an entry in ``selcon_plugin.hosts``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from selcon_plugin.config.checks import flatten_config, value_of
from selcon_plugin.config.demo import Demo
from selcon_plugin.config.files import builtin_config
from selcon_plugin.config.help import ConfigHelp
from selcon_plugin.config.host_data import (
    Adaptation,
    NetworkSettings,
    PlainNetwork,
    Processes,
    RecognizedNetwork,
    RunFiles,
    RunKeys,
    RunResult,
    keys_in,
)
from selcon_plugin.config.keys import ConfigKeys
from selcon_plugin.config.loading import Merger
from selcon_plugin.io.atomic import save_atomically
from selcon_plugin.models.architecture import RECORD
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.pretrained import read_network_file
from selcon_plugin.models.state_keys import without_method


class Host(ABC):
    """Framework that trains networks.

    Attributes:
        name: Name of its package.
        title: Display name.
        keys: The plugin's keys in its config.
        run_keys: Its own keys of settings that every host has.
        run_files: Files from which the progress of a run is read.
        folder_config: The package's config for a folder of images; empty for the defaults.
        checkpoint_key: Entry of a checkpoint that contains the network.
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
        """Return whether keys belong to this host's config, by their case.

        Args:
            keys: Full keys, or keys of the top level.

        Returns:
            Whether all do; False for no keys at all.
        """
        return keys_in(self.keys.case)(keys)

    @abstractmethod
    def default_config(self) -> Any:
        """Return the host's default config with the plugin's keys, not frozen."""

    @abstractmethod
    def complete_config(self, cfg: Any) -> Any:
        """Return a checked copy of a config with all keys that a run needs.

        Raises:
            ValueError: If a value is invalid; the message names key, value and the valid
                values.
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
            options: ``KEY VALUE`` pairs as on a command line, which are merged last.
            overrides: Values by full key, which are merged before ``options``.
            images: Folder of images to train on.
            camera_pattern: Pattern that finds their cameras.

        Returns:
            Complete, frozen config.

        Raises:
            ValueError: If the file is unreadable, or a key or a value is invalid.
            FileNotFoundError: If the file does not exist.
        """  # noqa: DOC502  (raised by the functions called here)
        if not file and images and self.folder_config:
            file = builtin_config(self.folder_config)
        cfg = self.default_config()
        merger = Merger(cfg, self.keys)
        if file:
            merger.merge_file(file)
        merger.merge_overrides(overrides or {})
        merger.merge_options(options)
        self._follow_training_data(cfg, merger.given)
        self._name_images(cfg, images, camera_pattern)
        with merger.located():
            cfg = self.complete_config(cfg)
        cfg.freeze()
        return cfg

    def _follow_training_data(self, cfg: Any, given: Collection[str]) -> None:
        """Test on the training data where only these are named.

        The hosts' default is Market-1501, whichever data set is trained on.
        """
        data, tests = self.run_keys.training_data, self.run_keys.test_data
        if data in given and tests not in given:
            node, _, name = tests.rpartition(".")
            value_of(cfg, node)[name] = copy.copy(value_of(cfg, data))

    @abstractmethod
    def _name_images(self, cfg: Any, images: str, camera_pattern: str) -> None:
        """Replace the data sets by a folder of images; "" changes nothing."""

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
        """Translate settings with host-independent names into values by full keys.

        Args:
            network: Network to train.
            device: Device; ``"auto"`` keeps that of the config.
            dataset: Data set to train and to test on.
            options: The plugin's options of run and method, such as ``temperature``.
            clustering: The plugin's options of the clustering and its labeler.
            **run: Values by the names of :class:`RunKeys`, and ``seed``; None keeps the
                value of the config.

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
        """Return the values that select a network."""

    @abstractmethod
    def _of_device(self, device: str) -> dict[str, Any]:
        """Return the values that select a device."""

    @abstractmethod
    def _of_dataset(self, name: str) -> dict[str, Any]:
        """Return the values that select a data set for training and test."""

    @abstractmethod
    def help(self) -> ConfigHelp:
        """Return the documentation of the config keys."""

    @abstractmethod
    def default_values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the default config with the defaults of another config's method.

        Args:
            settings: Values of the other config by full keys.
        """

    def comparable_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Rename settings to the default host's keys where it has the same setting.

        Args:
            settings: Effective values of this host by full keys.

        Returns:
            The same values, some of them with other keys.
        """
        return dict(settings)

    @abstractmethod
    def check_trainable(self, cfg: Any) -> None:
        """Refuse a config that cannot be trained, before anything is built.

        Raises:
            ValueError: If the config is for supervised training, or names an unknown data
                set.
        """

    # --- runs -----------------------------------------------------------------------------

    @abstractmethod
    def train(
        self, cfg: Any, *, resume: bool = False, overwrite: bool = False, source: str = ""
    ) -> RunResult:
        """Train in this process, one of possibly several, and write ``results.json``.

        Args:
            cfg: Complete config.
            resume: Whether to resume from the last checkpoint in the folder, if there is
                one.
            overwrite: Whether a new run may start in the folder of an earlier one, whose
                files are moved aside. Otherwise it is refused.
            source: File of the config, for the log.
        """

    @abstractmethod
    def evaluate(self, cfg: Any, *, source: str = "") -> Mapping[str, Any]:
        """Evaluate the weights that a config names.

        Args:
            cfg: Complete config.
            source: File of the config, for the log.

        Returns:
            Metrics by test set.

        Raises:
            ValueError: If there are no weights, or there is nothing to evaluate on.
        """

    def check_expected(self, cfg: Any, result: RunResult) -> None:  # noqa: B027
        """Compare the metrics with the config's expected ones, if a host supports it."""

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
            main: Function that is importable by name, as other processes import it.
            args: Arguments of the function.
            processes: Number of processes and their rendezvous.
            training: Config of the training, for checks before any process starts; None for
                an evaluation.

        Raises:
            ValueError: If the host trains in one process, and several are requested.
            ProcessFailure: If one of several processes failed.
        """  # noqa: DOC502  (raised by those that start several)
        if processes.per_machine > 1 or processes.num_machines > 1:
            raise ValueError(self._one_process())
        main(*args)

    def _one_process(self) -> str:
        return f"{self.title} trains in one process: remove --num-gpus and --num-machines"

    def prepare_script(self, command: Sequence[str]) -> None:  # noqa: B027
        """Prepare the host for a script of its own that does not know the plugin.

        Args:
            command: Arguments of Python that run the script under the plugin, for further
                processes.
        """

    def describe_network(self, settings: Mapping[str, Any]) -> tuple[str, str]:
        """Return backbone and input size of a config in short form, for tables.

        Args:
            settings: Effective values by full keys.

        Returns:
            For instance ``("osnet_x1_0", "256x128")``; empty where it is unknown.
        """
        return "", ""

    def supervised_config(self, cfg: Any) -> Any:
        """Return the config of the host's own baseline with network and budget of another.

        Args:
            cfg: Complete config of a training without identities.

        Raises:
            ValueError: If the host has no baseline with this network.
        """
        raise ValueError(f"there is no supervised baseline in {self.title}")

    def train_supervised(self, cfg: Any) -> None:
        """Train the host's own baseline with identities, and write ``results.json``.

        Args:
            cfg: Result of :meth:`supervised_config`.

        Raises:
            ValueError: If the host has no baseline.
        """
        raise ValueError(f"there is no supervised baseline in {self.title}")

    def demo(self, cfg: Any) -> Demo:
        """Return this host's steps of ``selcon demo``.

        Raises:
            ValueError: If the host has no demo.
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
            device: Device to compute on.

        Raises:
            ValueError: If the file contains another network.
            FileNotFoundError: If the file does not exist.
        """

    def inference_overrides(self, backbone: str = "") -> dict[str, Any]:
        """Return the settings to load a trained network without download or missing GPU.

        Args:
            backbone: Name of the model, for weights without a config.

        Raises:
            ValueError: If the host builds no models by name.
        """
        if backbone:
            raise ValueError(f"{self.title} loads no weights without a config")
        return {}

    def recognize(
        self, state: Mapping[str, torch.Tensor], file_name: str
    ) -> list[RecognizedNetwork]:
        """Find the networks that weights without a config belong to.

        Args:
            state: Tensors by name.
            file_name: Name of their file, which may decide between networks.

        Returns:
            The networks that have these tensors.
        """
        return []

    @abstractmethod
    def adaptation_overrides(self, adaptation: Adaptation) -> dict[str, Any]:
        """Return the settings to fine-tune a trained network."""

    @abstractmethod
    def checkpoints(self, folder: str | Path, epochs: int) -> list[tuple[int, Path]]:
        """List the checkpoints of a run.

        Args:
            folder: Folder of the run.
            epochs: Total number of epochs of the run.

        Returns:
            Number of epochs trained and file, in ascending order.
        """

    def write_network(self, checkpoint: str | Path, target: str | Path) -> None:
        """Write the network of a run's checkpoint, without the state of the run.

        Args:
            checkpoint: Path of the checkpoint.
            target: File to write or replace.
        """
        found = read_network_file(Path(checkpoint))
        content = {self.checkpoint_key: without_method(found.state)}
        if found.architecture:
            content[RECORD] = found.architecture
        save_atomically(content, target)

    def plain_network(
        self, cfg: Any, weights: str | Path, *, global_only: bool = False
    ) -> PlainNetwork:
        """Convert a network to one that the host builds and evaluates without the plugin.

        Args:
            cfg: Complete config of the network.
            weights: Its checkpoint.
            global_only: Whether to leave out its parts.

        Raises:
            ValueError: If the host's own models cannot express the network.
        """
        raise ValueError(f"{self.title} has no plain form of a network")

    def measure(self, cfg: Any, network: InferenceNetwork) -> Mapping[str, Any]:
        """Evaluate a network on the test sets of a config.

        Args:
            cfg: Complete config.
            network: Network on the CPU.

        Returns:
            Metrics by test set; empty if the host does not support this.
        """
        return {}

    def extract(self, cfg: Any, output: str | Path) -> tuple[int, int]:
        """Extract the features of a config's images with its weights into a file.

        Args:
            cfg: Complete config.
            output: File to write, with arrays ``paths``, ``camids`` and ``features``; the
                number of images and the feature dimension are returned.

        Raises:
            ValueError: If the host does not support this.
        """
        raise ValueError(
            f"{self.title}'s config cannot name the network here: use --weights FILE"
        )

    def _config_help(self, **options: Any) -> ConfigHelp:
        defaults = flatten_config(self.default_config())
        return ConfigHelp(self.keys, self.title, defaults, **options)

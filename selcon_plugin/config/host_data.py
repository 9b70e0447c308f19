"""Data that a workflow and a host exchange: keys, host-independent settings, results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selcon_plugin.models.inference import InferenceNetwork

__all__ = [
    "Adaptation",
    "NetworkSettings",
    "PlainNetwork",
    "ProcessFailure",
    "Processes",
    "RecognizedNetwork",
    "RunFiles",
    "RunKeys",
    "RunResult",
    "keys_in",
]


@dataclass(frozen=True)
class RunKeys:
    """Full keys of the settings that each host has under its own name.

    The data sets may be unknown, as empty texts.
    """

    output: str
    epochs: str
    batch_size: str
    learning_rate: str
    num_workers: str
    weights: str
    training_data: str = ""
    test_data: str = ""


@dataclass(frozen=True)
class RunFiles:
    """Files of a run's folder from which its progress is read.

    Attributes:
        begun: File or folder that exists once the run has a checkpoint.
        log: File with the progress; empty for the output of the run.
        progress: Pattern with the group ``epoch``, and optionally with ``days`` and
            ``time`` for the remaining time.
        first_epoch: Number of the first epoch in the log.
    """

    begun: str
    log: str
    progress: re.Pattern[str]
    first_epoch: int


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of a network to train, with host-independent names.

    Attributes:
        backbone: Model name in torchreid, or ``timm:`` and a name in timm; empty for that
            of the config.
        pretrained: Whether it starts from ImageNet weights, or a file of weights.
        input_size: Height and width of its input; None for those of the config.
    """

    backbone: str = ""
    pretrained: bool | str = True
    input_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Adaptation:
    """Settings of a training that starts from a trained network.

    Attributes:
        weights: Checkpoint of the network.
        method: Registered name of the method.
        folder: Folder of the run.
        epochs: Number of epochs to train.
        learning_rate: Constant learning rate of Adam.
        batch_size: Images per training step, and images per batch of extraction.
        num_workers: Number of processes that read images.
        checkpoint_period: Epochs between checkpoints, all of which are kept.
        device: ``"auto"`` for that of the config, or a device name of PyTorch.
        clustering: Options of the clustering, for a network whose config has none.
        foreign: Whether the network comes from another training; its head is kept then.
        backbone: Name of the network in its host; empty where it is unknown.
    """

    weights: str
    method: str
    folder: str
    epochs: int
    learning_rate: float
    batch_size: int
    num_workers: int
    checkpoint_period: int
    device: str = "auto"
    clustering: Mapping[str, Any] = field(default_factory=dict)
    foreign: bool = False
    backbone: str = ""


@dataclass(frozen=True)
class PlainNetwork:
    """A trained network in the form of its host, which needs no plugin.

    Attributes:
        network: The host's own model with the weights.
        trained: The trained network that it must equal.
        checkpoint: Content of its checkpoint.
        config: Config of the host that builds and evaluates it.
        weights_key: Key of the config that names the checkpoint.
        output_key: Key of the config that names the folder of a run.
        whole: Whether it is the whole trained network, not only a branch of it.
        notes: What differs from the config of the training, one sentence each.
    """

    network: InferenceNetwork
    trained: InferenceNetwork
    checkpoint: dict[str, Any]
    config: Any
    weights_key: str
    output_key: str
    whole: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RecognizedNetwork:
    """Network that weights without a config belong to, by their tensors.

    Attributes:
        title: Its name for a message.
        backbone: Name of the model, as for weights without a config.
        settings: Further values of its config by full keys.
        assumed: What the tensors do not tell, and is therefore assumed; empty for nothing.
    """

    title: str
    backbone: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    assumed: str = ""


@dataclass(frozen=True)
class Processes:
    """Number and rendezvous of the processes of one run.

    Attributes:
        per_machine: Number of processes on this machine, on GPUs or CPUs.
        num_machines: Number of machines.
        machine_rank: Rank of this machine.
        meeting_point: Rendezvous address ``tcp://host:port``, or ``"auto"`` on one machine.
        timeout_minutes: Time that a process waits for another before it gives up.
    """

    per_machine: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    meeting_point: str = "auto"
    timeout_minutes: float = 30.0


@dataclass(frozen=True)
class RunResult:
    """Result of a training in this process.

    Attributes:
        folder: Folder of the run.
        weights: Last checkpoint of the run.
        metrics: The host's metrics by test set; empty except on the main process.
        trained: False if the config requested only an evaluation.
    """

    folder: Path
    weights: Path
    metrics: Mapping[str, Any] = field(default_factory=dict, repr=False)
    trained: bool = True


class ProcessFailure(RuntimeError):  # noqa: N818  (as in torch's ProcessExitedException)
    """Error for a training process that failed or was killed; the others were ended."""


def keys_in(case: Callable[[str], str]) -> Callable[[Iterable[str]], bool]:
    """Return a function that checks whether all keys are in one case.

    Args:
        case: ``str.upper`` or ``str.lower``.

    Returns:
        The function; it returns False for no keys at all.

    Example:
        >>> keys_in(str.lower)(["train.lr"]), keys_in(str.lower)(["train", "MODEL"])
        (True, False)
    """

    def check(keys: Iterable[str]) -> bool:
        names = [str(key) for key in keys]
        return bool(names) and all(name == case(name) for name in names)

    return check

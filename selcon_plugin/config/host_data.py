"""What passes between a workflow and a host: keys, settings by neutral names, results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Adaptation",
    "NetworkSettings",
    "ProcessFailure",
    "Processes",
    "RunFiles",
    "RunKeys",
    "RunResult",
    "keys_in",
]


@dataclass(frozen=True)
class RunKeys:
    """Full keys of the settings that each host has under a name of its own."""

    output: str
    epochs: str
    batch_size: str
    learning_rate: str
    num_workers: str
    weights: str


@dataclass(frozen=True)
class RunFiles:
    """Which files of a run's folder tell how far the run is.

    Attributes:
        begun: What is there once there is something to lose.
        log: File that shows the progress; empty for what the run prints.
        progress: Finds ``epoch`` in it, and ``days`` and ``time`` left where it tells them.
        first_epoch: Number of the first epoch in it.
    """

    begun: str
    log: str
    progress: re.Pattern[str]
    first_epoch: int


@dataclass(frozen=True)
class NetworkSettings:
    """A network to train, by neutral names.

    Attributes:
        backbone: torchreid's name of a model, or timm's after ``timm:``; empty for that of
            the config.
        pretrained: Whether it starts from ImageNet weights, or a file of weights.
        input_size: Height and width of its input; None for those of the config.
    """

    backbone: str = ""
    pretrained: bool | str = True
    input_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Adaptation:
    """A training that starts from a trained network, by neutral names.

    Attributes:
        weights: Checkpoint of the network.
        method: Registered name.
        folder: Folder of the run.
        epochs: Epochs to train.
        learning_rate: Of Adam; constant.
        batch_size: Images of a training step, and of those computed together.
        num_workers: Processes that read images.
        checkpoint_period: Epochs between checkpoints, all of which are kept.
        device: ``"auto"`` for that of the config, or as in PyTorch.
        clustering: Options of the clustering, for a network whose config has none.
        foreign: Whether the plugin did not train the network: its head stays as it is.
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


@dataclass(frozen=True)
class Processes:
    """The processes of one run.

    Attributes:
        per_machine: Processes on this machine, on GPUs or CPUs.
        num_machines: Number of machines.
        machine_rank: Rank of this machine.
        meeting_point: ``tcp://host:port``, or ``"auto"`` on one machine.
        timeout_minutes: How long a process waits for another before it gives up.
    """

    per_machine: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    meeting_point: str = "auto"
    timeout_minutes: float = 30.0


@dataclass(frozen=True)
class RunResult:
    """What a training in this process returned.

    Attributes:
        folder: Folder of the run.
        weights: Its last checkpoint.
        metrics: The host's metrics by test set; empty on all but the main process.
        trained: False if the config asked for an evaluation only.
    """

    folder: Path
    weights: Path
    metrics: Mapping[str, Any] = field(default_factory=dict, repr=False)
    trained: bool = True


class ProcessFailure(RuntimeError):  # noqa: N818  (as in torch's ProcessExitedException)
    """A training process failed or was killed; the others have been ended."""


def keys_in(case: Callable[[str], str]) -> Callable[[Iterable[str]], bool]:
    """Return a check whether all keys are in one case.

    Args:
        case: ``str.upper`` or ``str.lower``.

    Returns:
        The check; False for no keys at all.

    Example:
        >>> keys_in(str.lower)(["train.lr"]), keys_in(str.lower)(["train", "MODEL"])
        (True, False)
    """

    def check(keys: Iterable[str]) -> bool:
        names = [str(key) for key in keys]
        return bool(names) and all(name == case(name) for name in names)

    return check

"""What a finished run leaves for others to read: ``results.json`` in its folder."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from selcon_plugin._version import __version__
from selcon_plugin.distributed import rank, world_size
from selcon_plugin.io.atomic import write_atomically

RESULTS_FILE = "results.json"

_PROCESS_STATUS = Path("/proc/self/status")
_CPU_INFO = Path("/proc/cpuinfo")
_Result = TypeVar("_Result")


class RunMeter:
    """Seconds of training and peak memory of a run, over all its parts.

    Its state is saved with each checkpoint. Work that was lost after the last checkpoint of
    a killed part, and is done again, is counted once.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None  # None while nothing is counted
        self._peak_memory = 0.0
        self._peak_gpu_memory = 0.0

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    @property
    def peak_memory_mib(self) -> float:
        """Largest resident memory so far, of the training process alone, in MiB."""
        self._peak_memory = max(self._peak_memory, peak_memory_mib())
        return self._peak_memory

    @property
    def peak_gpu_memory_mib(self) -> float:
        """Most memory that tensors took on a GPU so far, in MiB; 0 without a GPU."""
        self._peak_gpu_memory = max(self._peak_gpu_memory, peak_gpu_memory_mib())
        return self._peak_gpu_memory

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds spent inside."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._stop()

    def excluding(self, function: Callable[..., _Result]) -> Callable[..., _Result]:
        """Wrap a function whose seconds are not to be counted, such as evaluation."""

        @functools.wraps(function)
        def uncounted(*args: Any, **kwargs: Any) -> _Result:
            was_running = self._since is not None
            self._stop()
            try:
                return function(*args, **kwargs)
            finally:
                if was_running:
                    self._since = time.perf_counter()

        return uncounted

    def _stop(self) -> None:
        self._seconds, self._since = self.seconds, None

    def state_dict(self) -> dict[str, float]:
        """Return what has been measured."""
        return {
            "seconds": self.seconds,
            "peak_memory_mib": self.peak_memory_mib,
            "peak_gpu_memory_mib": self.peak_gpu_memory_mib,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what was measured until a checkpoint.

        Args:
            state: What :meth:`state_dict` returned when the checkpoint was written.
        """
        self._seconds = state["seconds"]
        self._peak_memory = max(self._peak_memory, state["peak_memory_mib"])
        self._peak_gpu_memory = max(self._peak_gpu_memory, state["peak_gpu_memory_mib"])


def peak_memory_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    # Not ru_maxrss where it can be helped: on Linux a new process inherits the peak of the
    # one that started it.
    if _PROCESS_STATUS.exists():
        for line in _PROCESS_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024  # from KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)  # bytes there, else KiB


def peak_gpu_memory_mib() -> float:
    """Return the most memory that tensors took on a GPU so far, in MiB; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    devices = range(torch.cuda.device_count())
    return max(torch.cuda.max_memory_allocated(device) for device in devices) / 2**20


def delete_results(folder: str | Path) -> None:
    """Remove the results of an earlier run from its folder, on the main process."""
    if folder and rank() == 0:
        (Path(folder) / RESULTS_FILE).unlink(missing_ok=True)


def write_results(
    folder: str | Path,
    *,
    method: str,
    seed: int,
    num_images: int,
    epochs: int,
    steps: int,
    metrics: Mapping[str, Mapping[str, float]],
    meter: RunMeter,
    num_clusters: int | None,
    device: torch.device,
    host: str,
) -> None:
    """Write ``results.json`` into the run's folder; on the main process alone.

    Args:
        folder: Folder of the run; nothing is written if it is empty.
        method: Registered name.
        seed: Seed of the run.
        num_images: Training images.
        epochs: Epochs trained.
        steps: Optimizer steps trained.
        metrics: Percent by metric, by test set; empty without a test set.
        meter: What the run took.
        num_clusters: Clusters of the last clustering, None without.
        device: What computed.
        host: Package of the host framework.
    """
    if not folder or rank() > 0:
        return
    record = {
        "method": method,
        "seed": seed,
        "num_images": num_images,
        "epochs": epochs,
        "steps": steps,
        "num_processes": world_size(),
        "metrics": metrics,
        "train_seconds": meter.seconds,
        "peak_memory_mib": meter.peak_memory_mib,
        "peak_gpu_memory_mib": meter.peak_gpu_memory_mib or None,
        "num_clusters": num_clusters,
        "device": describe_device(device),
        "host": host,
        "versions": _versions(host),
    }
    write_atomically(json.dumps(record, indent=2) + "\n", Path(folder) / RESULTS_FILE)


def describe_device(device: torch.device) -> str:
    """Name what computes: the GPU, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_model() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions(host: str) -> dict[str, str]:
    try:
        version = importlib.metadata.version(host)
    except importlib.metadata.PackageNotFoundError:  # a clone on the path
        version = "unknown"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        host: version,
        "selcon_plugin": __version__,
    }

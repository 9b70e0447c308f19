"""Results of a finished run, written to ``results.json`` in its folder."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from selcon_plugin._version import __version__
from selcon_plugin.distributed import rank, world_size
from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.integrity import DamagedFileError, sealed_json, unsealed_json

RESULTS_FILE = "results.json"
REMEDY = "Remove it and resume the run (selcon train --resume), which writes it again"

_PROCESS_STATUS = Path("/proc/self/status")
# Entries of the file by type.
_WHOLE = ("seed", "num_images", "epochs", "steps", "num_processes", "num_clusters")
_NUMBERS = ("train_seconds", "peak_memory_mib", "peak_gpu_memory_mib")
_TEXTS = ("method", "device", "host")

_CPU_INFO = Path("/proc/cpuinfo")
_Result = TypeVar("_Result")


class RunMeter:
    """Training time and peak memory of a run, including resumed parts.

    The state is saved with each checkpoint. Work that was lost after the last checkpoint
    of a killed run and is repeated after resuming is counted once.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None  # None while nothing is counted
        self._peak_memory = 0.0
        self._peak_gpu_memory = 0.0

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    @property
    def peak_memory_mib(self) -> float:
        """Peak resident memory of the training process only, in MiB."""
        self._peak_memory = max(self._peak_memory, peak_memory_mib())
        return self._peak_memory

    @property
    def peak_gpu_memory_mib(self) -> float:
        """Peak memory of tensors on a GPU so far, in MiB; 0 without a GPU."""
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
        """Wrap a function whose time is not counted, such as evaluation."""

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
        """Return the measurements."""
        return {
            "seconds": self.seconds,
            "peak_memory_mib": self.peak_memory_mib,
            "peak_gpu_memory_mib": self.peak_gpu_memory_mib,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the measurements of a checkpoint.

        Args:
            state: Result of :meth:`state_dict` when the checkpoint was written.
        """
        self._seconds = state["seconds"]
        self._peak_memory = max(self._peak_memory, state["peak_memory_mib"])
        self._peak_gpu_memory = max(self._peak_gpu_memory, state["peak_gpu_memory_mib"])


def peak_memory_mib() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    # ru_maxrss is only the fallback: on Linux a new process inherits its parent's peak.
    if _PROCESS_STATUS.exists():
        for line in _PROCESS_STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024  # from KiB
    if resource is None:
        peak_bytes = importlib.import_module("psutil").Process().memory_info().peak_wset
        return float(peak_bytes / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / (2**20 if sys.platform == "darwin" else 1024))  # bytes, else KiB


def peak_gpu_memory_mib() -> float:
    """Return the peak memory of tensors on a GPU so far, in MiB; 0 without a GPU."""
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
    """Write ``results.json`` into the run's folder, only on the main process.

    Args:
        folder: Folder of the run; nothing is written if it is empty.
        method: Registered name of the method.
        seed: Seed of the run.
        num_images: Number of training images.
        epochs: Number of epochs trained.
        steps: Number of optimizer steps.
        metrics: Metrics in percent by name, by test set; empty without a test set.
        meter: Time and memory of the run.
        num_clusters: Number of clusters of the last clustering; None without clustering.
        device: Device of the training.
        host: Package name of the host framework.
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
    write_atomically(sealed_json(record, indent=2), Path(folder) / RESULTS_FILE)


def read_results(file: str | Path) -> dict[str, Any]:
    """Read the results of a run; check its checksum and the types of the entries.

    Args:
        file: Path of ``results.json``.

    Returns:
        Content of the file, without the checksum. A file of an earlier version has none.

    Raises:
        DamagedFileError: If the file is damaged; the message names file, entry and remedy.
        FileNotFoundError: If there is no such file.
    """  # noqa: DOC502  (raised by the functions called here)
    record = unsealed_json(Path(file).read_bytes(), file, remedy=REMEDY)
    fault = _fault(record)
    if fault:
        raise DamagedFileError(f"{file} is damaged: {fault}. {REMEDY}")
    return record


def _fault(record: Mapping[str, Any]) -> str:
    """Return which entry has the wrong type; "" if none has."""
    for names, fits in ((_WHOLE, _is_whole), (_NUMBERS, _is_number), (_TEXTS, _is_text)):
        for name in names:
            if record.get(name) is not None and not fits(record[name]):
                return f"{name} is {record[name]!r}"
    for name, group in (("metrics", _is_metrics), ("after", _is_numbers)):
        if name in record and not group(record[name]):
            return f"{name} is no mapping of numbers"
    if not isinstance(record.get("versions", {}), dict):
        return "versions is no mapping"
    return ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_number(entry) or isinstance(entry, str) for entry in value.values()
    )


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_numbers, value.values()))


def describe_device(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_model() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
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

"""What a finished run leaves for others to read: ``results.json`` in its folder."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastreid.utils import comm

import selcon_plugin
from selcon_plugin.visualize import read_metrics

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
        self._peak_gpu_memory = max(self._peak_gpu_memory, _peak_gpu_memory_mib())
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


def _peak_gpu_memory_mib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    devices = range(torch.cuda.device_count())
    return max(torch.cuda.max_memory_allocated(device) for device in devices) / 2**20


def results_by_test_set(cfg: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return FastReID's results by test set; it leaves the name out where there is one.

    Args:
        cfg: Complete config.
        results: What ``SelConTrainer.train`` or ``test`` returned.

    Returns:
        Metrics by the test set's name; empty without a test set.
    """
    if not results:
        return {}
    names = cfg.DATASETS.TESTS
    return {names[0]: results} if len(names) == 1 else dict(results)


def forget_results(folder: str | Path) -> None:
    """Remove the results of an earlier run from its folder, on the main process."""
    if folder and comm.is_main_process():
        (Path(folder) / RESULTS_FILE).unlink(missing_ok=True)


def write_results(trainer: Any, results: Mapping[str, Any] | None) -> None:
    """Write ``results.json`` into the run's folder; on the main process alone.

    Args:
        trainer: The trainer, after training.
        results: What the trainer returned: metrics of the last evaluation, if any.
    """
    cfg, meter = trainer.cfg, trainer.meter
    if not cfg.OUTPUT_DIR or not comm.is_main_process():
        return
    metrics = {
        name: {metric: float(value) for metric, value in found.items()}
        for name, found in results_by_test_set(cfg, results or {}).items()
    }
    record = {
        "method": cfg.MODEL.SELCON.METHOD,
        "seed": cfg.MODEL.SELCON.SEED,
        "num_images": len(trainer.data_loader.dataset),
        "epochs": trainer.max_epoch,
        "steps": trainer.max_iter,
        "num_processes": comm.get_world_size(),
        "metrics": metrics,
        "train_seconds": meter.seconds,
        "peak_memory_mib": meter.peak_memory_mib,
        "peak_gpu_memory_mib": meter.peak_gpu_memory_mib or None,
        "num_clusters": _last_num_clusters(trainer),
        "device": describe_device(torch.device(cfg.MODEL.DEVICE)),
        "versions": _versions(),
    }
    file = Path(cfg.OUTPUT_DIR) / RESULTS_FILE
    partial = file.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, file)


def _last_num_clusters(trainer: Any) -> int | None:
    """Look up the last clustering: in this process, else in what an earlier part wrote."""
    storage = getattr(trainer, "storage", None)  # absent if the run was complete before
    if storage is not None and "num_clusters" in storage.latest():
        return int(storage.latest()["num_clusters"][0])
    if trainer.start_epoch == 0:
        return None  # the file may hold another run's
    file = Path(trainer.cfg.OUTPUT_DIR) / "metrics.json"
    written = read_metrics(file) if file.is_file() else []
    counts = [line["num_clusters"] for line in written if "num_clusters" in line]
    return int(counts[-1]) if counts else None


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


def _versions() -> dict[str, str]:
    try:
        fastreid = importlib.metadata.version("fastreid")
    except importlib.metadata.PackageNotFoundError:  # a clone on the path
        fastreid = "unknown"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastreid": fastreid,
        "selcon_plugin": selcon_plugin.__version__,
    }

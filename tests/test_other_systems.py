"""Windows and macOS, as far as Linux can play them: without what Python lacks there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import types
from multiprocessing import reduction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import dataloader

import selcon_plugin
from helpers.hosts import ROOT, needs_fastreid, needs_torchreid, run_python
from selcon_plugin.clustering.base import clustering_device
from selcon_plugin.hosts import get_host
from selcon_plugin.inference.embedder import choose_device
from selcon_plugin.runs import results

# Libraries that have their own code for each system come first; then Python loses what it
# has on no Windows, and everything of this package is imported and used.
PROGRAM = """
import importlib, importlib.util, json, os, pkgutil, signal, subprocess, tempfile
from pathlib import Path

for name in ("torch.utils.tensorboard", "sklearn.cluster", "sklearn.manifold", "timm",
             "filelock", "numba", "matplotlib.pyplot", "PIL.Image", "onnx"):
    if name != "timm" and importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
for name in ("resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "syslog", "crypt"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgid",
             "setsid", "killpg", "sched_getaffinity", "sched_setaffinity", "sysconf",
             "mkfifo", "uname", "statvfs", "nice", "chown", "fchown", "fchmod", "lchown",
             "getloadavg", "sync", "pread", "pwrite", "posix_fadvise", "ttyname",
             "WIFSIGNALED"):  # but for what filelock has of its own for each system
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD",
             "SIGPIPE", "SIGCONT", "SIGSTOP", "sigwaitinfo", "sigwait", "sigtimedwait",
             "pthread_sigmask", "pthread_kill", "alarm", "setitimer", "siginterrupt"):
    if hasattr(signal, name):
        delattr(signal, name)

import selcon_plugin

hosts = [h for h in ("fastreid", "torchreid") if importlib.util.find_spec(h)]
for host in hosts:
    importlib.import_module(f"selcon_plugin.{host}_ext")
missing = {"fastreid", "torchreid"} - set(hosts)
absent = tuple(f"selcon_plugin.{host}_ext" for host in missing)
imported = 0
for found in pkgutil.walk_packages(selcon_plugin.__path__, "selcon_plugin."):
    if found.name.endswith("__main__") or found.name.startswith(absent):
        continue
    importlib.import_module(found.name)
    imported += 1

import numpy as np
from PIL import Image

with tempfile.TemporaryDirectory() as folder:
    crops = Path(folder, "crops")
    rng = np.random.default_rng(0)
    for number in range(12):
        file = crops / f"c{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)).save(file)
    done = {}
    for host in hosts:
        run = selcon_plugin.fit(
            crops, Path(folder, host), host=host, method="SelectiveContrastive", epochs=1,
            backbone="osnet_x0_25" if host == "torchreid" else "timm:test_resnet",
            pretrained=False, input_size=(64, 32), batch_size=4, num_workers=0,
            device="cpu", num_parts=0)
        embedder = run.embedder()
        index = selcon_plugin.Index.create(Path(folder, f"{host}-index"), embedder)
        index.add(crops, embedder)
        first = next(crops.rglob("*.png"))
        match = selcon_plugin.search(index, [first], embedder=embedder)[0].matches[0]
        done[host] = [len(index), Path(match.path).suffix]
    print(json.dumps([imported, hosts, done]))
"""


def test_imports_trains_and_indexes_without_what_only_posix_has():
    imported, hosts, done = run_python(PROGRAM)
    assert imported > 150
    assert done == {host: [12, ".png"] for host in hosts}


def test_peak_memory_is_measured_on_windows(monkeypatch, tmp_path):
    memory = types.SimpleNamespace(peak_wset=3 * 2**20)
    process = types.SimpleNamespace(memory_info=lambda: memory)
    psutil = types.SimpleNamespace(Process=lambda: process)
    monkeypatch.setattr(results, "_PROCESS_STATUS", tmp_path / "absent")
    assert results.peak_memory_mib() > 100  # by the module that macOS has as well
    monkeypatch.setattr(results, "resource", None)
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert results.peak_memory_mib() == 3


@pytest.fixture
def crops(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        file = tmp_path / "crops" / f"c{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "crops"


TINY = {
    "epochs": 1,
    "pretrained": False,
    "input_size": (64, 32),
    "batch_size": 4,
    "device": "cpu",
    "num_parts": 0,
    "clustering": {"eps": 0.7, "min_samples": 2, "k1": 6, "k2": 2},
}
HOSTS = [
    pytest.param("fastreid", "timm:test_resnet", marks=needs_fastreid),
    pytest.param("torchreid", "osnet_x0_25", marks=needs_torchreid),
]


@pytest.mark.parametrize(("host", "backbone"), HOSTS)
def test_all_that_a_reading_process_gets_can_be_pickled(
    monkeypatch, tmp_path, crops, host, backbone
):
    """Windows and macOS start processes by spawning: they receive everything pickled."""
    begin, seen = dataloader._BaseDataLoaderIter.__init__, []

    def begin_pickled(self, loader):
        received = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
        pickle.loads(reduction.ForkingPickler.dumps(received))
        seen.append(type(loader.dataset).__name__)
        begin(self, loader)

    monkeypatch.setattr(dataloader._BaseDataLoaderIter, "__init__", begin_pickled)
    run = selcon_plugin.fit(
        crops, tmp_path / "run", host=host, backbone=backbone, num_workers=0, **TINY
    )
    run.embedder().embed_folder(crops)
    assert len(set(seen)) >= 2
    assert len(seen) >= 3  # features for the clusters, training, features of the folder


SPAWNED = """
import multiprocessing
import selcon_plugin

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    run = selcon_plugin.fit({crops!r}, {output!r}, host={host!r}, backbone={backbone!r},
                            num_workers=1, **{tiny!r})
    print(len(run.embedder().embed_folder({crops!r}, num_workers=1).paths))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("host", "backbone"), HOSTS)
def test_trains_with_spawned_reading_processes(tmp_path, crops, host, backbone):
    file = tmp_path / "train.py"
    values = {"host": host, "backbone": backbone, "tiny": TINY}
    file.write_text(
        SPAWNED.format(crops=str(crops), output=str(tmp_path / "run"), **values)
    )
    done = subprocess.run(
        [sys.executable, str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "12"


@pytest.fixture(params=[True, False], ids=["a Mac", "no Mac"])
def has_mps(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: request.param)
    return request.param


def test_apple_gpu_is_a_device_where_there_is_one(has_mps):
    assert choose_device("auto") == torch.device("cpu")  # mps only if it is asked for
    if has_mps:
        assert choose_device("mps") == torch.device("mps")
    else:
        with pytest.raises(ValueError, match=r"device must be .*no Apple GPU.* 'mps'"):
            choose_device("mps")
        with pytest.raises(ValueError, match=r"device must be .* 'mps'"):
            selcon_plugin.fit("crops", "run", device="mps")


@pytest.mark.parametrize(
    ("features", "clusters"), [("mps", "cpu"), ("cpu", "cpu"), ("cuda:1", "cuda:1")]
)
def test_features_on_the_apple_gpu_are_clustered_on_the_cpu(features, clusters):
    assert clustering_device(torch.device(features)) == torch.device(clusters)


@needs_fastreid
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fastreid_takes_the_apple_gpu(has_mps, caplog, dtype):
    host = get_host("fastreid")
    keys = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", dtype]
    if not has_mps:
        with pytest.raises(ValueError, match=r"MODEL\.DEVICE .* 'mps'"):
            host.load_config("", [*keys, "MODEL.DEVICE", "mps"])
        return
    with caplog.at_level("WARNING"):
        cfg = host.load_config("", [*keys, "MODEL.DEVICE", "mps"])
    assert (cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED) == ("mps", False)
    assert "SOLVER.AMP.ENABLED needs CUDA or a CPU" in caplog.text
    with caplog.at_level("WARNING"):
        cfg = host.load_config("", ["MODEL.DEVICE", "cuda"])
    assert cfg.MODEL.DEVICE == "cpu"
    assert "for the Apple GPU set it to mps" in caplog.text
    assert host.overrides(device="mps")["MODEL.DEVICE"] == "mps"


@needs_torchreid
def test_torchreid_warns_that_it_trains_on_the_cpu(caplog):
    host = get_host("torchreid")
    with caplog.at_level("WARNING"):
        assert host.overrides(device="mps") == {"use_gpu": False}
    assert "torchreid trains on CUDA or on the CPU" in caplog.text
    assert host.overrides(device="cuda:0") == {"use_gpu": True}

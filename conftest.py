"""Markers, the choice of tests, and hosts that are not installed."""

import importlib.util
import logging
import os

import pytest
import torch

from helpers.network import REFUSED, forbid_network

os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are written, never shown
# The tests' tensors are small: on a busy machine several threads wait for each other, and
# one thread adds up in one order. For this process and for those that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

forbid_network()

_MISSING_HOSTS = [
    host for host in ("fastreid", "torchreid") if importlib.util.find_spec(host) is None
]

# Neither the tests nor the modules of an adapter can be imported without its host; the
# modules would be, for their doctests.
collect_ignore_glob = [
    pattern
    for host in _MISSING_HOSTS
    for pattern in (f"selcon_plugin/{host}_ext/*", f"tests/{host}_ext/*")
]


def pytest_report_header():
    return [f"{host} is not installed: its tests are left out" for host in _MISSING_HOSTS]


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run the slow tests as well")


# Folders whose tests train whole runs or start programs: minutes, others take seconds.
_LONG = {"fastreid_ext", "torchreid_ext", "faults", "tools", "workflows"}


def pytest_collection_modifyitems(config, items):
    # With several processes, none is left alone with a long file at the end.
    items.sort(key=lambda item: item.path.parent.name not in _LONG)
    slow = pytest.mark.skip(reason="slow: runs with --runslow")
    gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that a test of the core runs on."""
    return request.param


@pytest.fixture(autouse=True)
def _no_network():
    """Fail a test that asks for another machine, even if the error was handled."""
    REFUSED.clear()
    yield
    assert not REFUSED, "a test must not reach the network"


@pytest.fixture(autouse=True)
def _restore_loggers():
    """Undo what a run in this process does to the loggers: handlers, level, propagation."""
    loggers = [logging.getLogger(name) for name in ("selcon_plugin", "fastreid")]
    before = [(list(log.handlers), log.level, log.propagate) for log in loggers]
    yield
    for log, (handlers, level, propagate) in zip(loggers, before, strict=True):
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import selcon_plugin
from selcon_plugin.runs import results as run_record
from selcon_plugin.runs.results import (
    RunMeter,
    delete_results,
    describe_device,
    peak_memory_mib,
    write_results,
)


@pytest.fixture
def clock(monkeypatch):
    """Clock set by the tests."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def test_seconds_count_while_running_and_not_inside_excluded_functions(clock):
    meter = RunMeter()
    clock.seconds += 5  # nothing runs yet

    def evaluate(seconds):
        clock.seconds += seconds
        assert meter.seconds == 3
        return seconds

    with meter.running():
        clock.seconds += 3
        assert meter.excluding(evaluate)(50) == 50
        clock.seconds += 4
        assert meter.seconds == 7
    clock.seconds += 9
    assert meter.seconds == 7


def test_excluded_function_that_fails_or_comes_after_changes_nothing(clock):
    meter = RunMeter()

    def fail():
        clock.seconds += 1
        raise OSError

    with meter.running():
        with pytest.raises(OSError):  # noqa: PT011
            meter.excluding(fail)()
        clock.seconds += 2
    with pytest.raises(OSError):  # noqa: PT011
        meter.excluding(fail)()
    clock.seconds += 2
    assert meter.seconds == 2


def test_parts_of_a_run_add_up(clock):
    first, second = RunMeter(), RunMeter()
    with first.running():
        clock.seconds += 30
        state = first.state_dict()
        clock.seconds += 10  # lost: the run is killed here
    second.load_state_dict(state)
    with second.running():
        clock.seconds += 20
    assert second.seconds == 50


def test_peaks_are_the_largest_of_all_parts(monkeypatch):
    meter = RunMeter()
    meter.load_state_dict(
        {"seconds": 0.0, "peak_memory_mib": 1e9, "peak_gpu_memory_mib": 1e8}
    )
    assert meter.peak_memory_mib == 1e9
    assert meter.peak_gpu_memory_mib == 1e8
    monkeypatch.setattr(run_record, "peak_memory_mib", lambda: 2e9)
    assert meter.state_dict()["peak_memory_mib"] == 2e9


def resident_mib(before):
    """Return the current memory of this process, or its peak as a fallback."""
    status = run_record._PROCESS_STATUS
    text = status.read_text() if status.exists() else ""
    _, found, line = text.partition("VmRSS:")
    return int(line.split()[0]) / 1024 if found else before


def test_peak_memory_grows_with_allocated_memory():
    before = peak_memory_mib()
    expected = resident_mib(before) + before
    ballast = torch.ones(int(before / 4 * 2**20))  # four bytes each: as much as the peak
    assert 0.8 * expected < peak_memory_mib() < 1.2 * expected
    del ballast
    assert peak_memory_mib() > 0.8 * expected  # a peak


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_unit_of_the_peak_where_there_is_no_proc(tmp_path, monkeypatch, system, unit):
    monkeypatch.setattr(run_record, "_PROCESS_STATUS", tmp_path / "absent")
    monkeypatch.setattr(sys, "platform", system)
    usage = SimpleNamespace(ru_maxrss=300 * 2**20 // unit)
    monkeypatch.setattr(run_record.resource, "getrusage", lambda _who: usage)
    assert peak_memory_mib() == 300


@pytest.mark.gpu
def test_peak_of_gpu_memory():
    torch.cuda.reset_peak_memory_stats()
    meter = RunMeter()
    ballast = torch.zeros(100 * 2**18, device="cuda")
    del ballast
    assert 100 <= meter.peak_gpu_memory_mib < 200


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the results of a run with changes."""

    def write_record(folder=tmp_path, **changes):
        record = {
            "method": "SelectiveContrastive",
            "seed": 3,
            "num_images": 40,
            "epochs": 2,
            "steps": 10,
            "metrics": {"few": {"mAP": 12.5}},
            "meter": RunMeter(),
            "num_clusters": None,
            "device": torch.device("cpu"),
            "host": "torch",
        }
        write_results(folder, **(record | changes))

    return write_record


def test_record_describes_run_and_machine(write, tmp_path, clock):
    meter = RunMeter()
    with meter.running():
        clock.seconds += 12
    write(meter=meter, num_clusters=7)
    record = json.loads((tmp_path / "results.json").read_text())
    given = {"method": "SelectiveContrastive", "seed": 3, "num_images": 40, "epochs": 2}
    given |= {"steps": 10, "metrics": {"few": {"mAP": 12.5}}, "num_clusters": 7}
    assert given.items() <= record.items()
    assert record["train_seconds"] == 12
    assert record["peak_memory_mib"] > 10
    assert record["num_processes"] == 1
    assert record["host"] == "torch"
    assert record["versions"]["selcon_plugin"] == selcon_plugin.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_host_that_is_not_installed_has_no_known_version(write, tmp_path):
    write(host="a-clone-on-the-path")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["versions"]["a-clone-on-the-path"] == "unknown"


def test_results_are_deleted_when_another_run_starts(write, tmp_path):
    write()
    delete_results(tmp_path)
    assert not list(tmp_path.glob("results.json*"))
    delete_results(tmp_path)


def test_run_without_a_folder_writes_nothing(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text("mine")
    delete_results("")
    write("")
    assert (tmp_path / "results.json").read_text() == "mine"


def test_only_the_main_process_writes_and_deletes(write, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("of the main process")
    monkeypatch.setattr(run_record, "rank", lambda: 1)
    write()
    delete_results(tmp_path)
    assert (tmp_path / "results.json").read_text() == "of the main process"


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_processor_is_named_with_its_threads(monkeypatch, threads, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert describe_device(torch.device("cpu")).endswith(words)


@pytest.mark.gpu
def test_gpu_is_named():
    found = describe_device(torch.device("cuda"))
    assert found == torch.cuda.get_device_name()

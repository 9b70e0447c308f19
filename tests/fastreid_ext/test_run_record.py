import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from selcon_plugin.engine import run_record
from selcon_plugin.engine.run_record import RunMeter, forget_results, peak_memory_mib
from selcon_plugin.fastreid_ext.run_record import results_by_test_set, write_results


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
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


def test_peak_memory_grows_with_what_is_touched(tmp_path):
    before = peak_memory_mib()
    ballast = torch.ones(int(before / 4 * 2**20))  # four bytes each: doubles the memory
    assert 0.8 * before < peak_memory_mib() - before < 1.5 * before
    del ballast
    assert peak_memory_mib() > 1.8 * before  # a peak


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


def test_results_by_test_set():
    def cfg(*names):
        return SimpleNamespace(DATASETS=SimpleNamespace(TESTS=names))

    assert results_by_test_set(cfg("A"), {"mAP": 1}) == {"A": {"mAP": 1}}
    two = {"A": {"mAP": 1}, "B": {"mAP": 2}}
    assert results_by_test_set(cfg("A", "B"), two) == two
    assert results_by_test_set(cfg(), {}) == {}


@pytest.fixture
def trainer(tiny_cfg, tmp_path):
    tiny_cfg.OUTPUT_DIR = str(tmp_path)
    loader = SimpleNamespace(dataset=range(40))
    progress = {"start_epoch": 2, "max_epoch": 2, "max_iter": 10}
    return SimpleNamespace(cfg=tiny_cfg, data_loader=loader, meter=RunMeter(), **progress)


def written(trainer):
    write_results(trainer, {})
    with open(f"{trainer.cfg.OUTPUT_DIR}/results.json") as stream:
        return json.load(stream)


def test_last_clusters_are_found_in_the_storage_or_in_the_file(trainer, tmp_path):
    assert written(trainer)["num_clusters"] is None
    lines = [{"iteration": 4, "num_clusters": 7.0}, {"iteration": 9, "num_clusters": 5.0}]
    lines.append({"iteration": 14, "lr": 0.1})
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert written(trainer)["num_clusters"] == 5
    trainer.start_epoch = 0
    assert written(trainer)["num_clusters"] is None  # those are of an earlier run
    trainer.storage = SimpleNamespace(latest=lambda: {"num_clusters": (6.0, 14)})
    assert written(trainer)["num_clusters"] == 6


def test_results_are_forgotten_when_another_run_begins(trainer, tmp_path):
    written(trainer)
    forget_results(tmp_path)
    assert not list(tmp_path.glob("results.json*"))
    forget_results(tmp_path)


def test_run_without_a_folder_writes_nothing(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text("mine")
    trainer.cfg.OUTPUT_DIR = ""
    forget_results("")
    write_results(trainer, {})
    assert (tmp_path / "results.json").read_text() == "mine"

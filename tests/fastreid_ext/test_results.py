import json
from types import SimpleNamespace

import pytest

from selcon_plugin.fastreid_ext.results import results_by_test_set, write_results
from selcon_plugin.runs.results import RunMeter, delete_results


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


def test_run_without_a_folder_writes_nothing(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text("mine")
    trainer.cfg.OUTPUT_DIR = ""
    delete_results("")
    write_results(trainer, {})
    assert (tmp_path / "results.json").read_text() == "mine"

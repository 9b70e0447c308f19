"""What the bench makes of finished runs, without training anything."""

import csv
import json
from pathlib import Path

import pytest

from selcon_plugin.workflows.bench_table import (
    Outcome,
    Report,
    Run,
    budget_notes,
    differences,
    mean_and_std,
    summarize,
)


def record(m_ap=50.0, **changes):
    metrics = {"mAP": m_ap, "Rank-1": m_ap + 20, "mINP": m_ap - 30}
    return {
        "method": "SelectiveContrastive",
        "steps": 100,
        "metrics": {"Market1501": metrics},
        "train_seconds": 90.0,
        "peak_memory_mib": 500.0,
        "peak_gpu_memory_mib": None,
        "num_clusters": None,
        "device": "a processor, 2 threads",
        "versions": {"python": "3.11", "torch": "2.13"},
    } | changes


def run(config="scl", seed=0, **settings):
    settings = {"SOLVER.MAX_EPOCH": 20, "SOLVER.BASE_LR": 0.1} | settings
    return Run(config, seed, Path("out") / config / f"seed{seed}", settings)


# --- aggregation --------------------------------------------------------------------------


def test_mean_and_sample_deviation_by_hand():
    # Deviations from 4 are -2, 0, 2: (4 + 0 + 4) / (3 - 1) = 4, whose root is 2.
    assert mean_and_std([2.0, 4.0, 6.0]) == (4.0, 2.0)
    assert mean_and_std([3.0]) == (3.0, None)
    assert mean_and_std([]) == (None, None)


def test_rows_by_hand():
    outcomes = [
        Outcome(run(seed=0), record(50.0, num_clusters=100, peak_memory_mib=700.0)),
        Outcome(run("cc", seed=0), error="exit status 1: it broke"),
        Outcome(run(seed=1), record(54.0, num_clusters=110, train_seconds=150.0)),
    ]
    scl, cc = summarize(outcomes, num_seeds=3)
    assert scl["config"] == "scl"
    assert (scl["seeds"], scl["finished"], scl["failed"]) == (3, 2, 0)
    assert (scl["mAP_mean"], scl["Rank-1_mean"], scl["mINP_mean"]) == (52, 72, 22)
    assert scl["mAP_std"] == pytest.approx(8**0.5)  # (2² + 2²) / (2 - 1)
    assert (scl["minutes_mean"], scl["clusters_mean"]) == (2.0, 105.0)
    assert scl["peak_memory_mib"] == 700.0
    assert scl["peak_gpu_memory_mib"] is None
    assert (cc["finished"], cc["failed"]) == (0, 1)
    assert cc["mAP_mean"] is cc["minutes_mean"] is cc["peak_memory_mib"] is None


def test_each_test_set_has_a_row_and_none_is_one_too():
    two = {name: {"mAP": 1.0, "Rank-1": 2.0, "mINP": 3.0} for name in ("A", "B")}
    rows = summarize([Outcome(run(), record(metrics=two))], 1)
    assert [row["test_set"] for row in rows] == ["A", "B"]
    (row,) = summarize([Outcome(run(), record(metrics={}))], 1)
    assert row["mAP_mean"] is None
    assert row["minutes_mean"] == 1.5


# --- the table ----------------------------------------------------------------------------


def cells(table):
    """Return a Markdown table's rows, without the header and its rule."""
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def test_table_shows_what_is_known():
    outcomes = [
        Outcome(run(seed=0), record(50.0, num_clusters=100)),
        Outcome(run("cc", seed=0), record(40.0, peak_gpu_memory_mib=2048.4)),
        Outcome(run(seed=1), record(53.0, num_clusters=103)),
        Outcome(run("cc", seed=1), error="exit status 1: it broke"),
    ]
    report = Report(outcomes, 2, "selcon bench")
    header, scl, cc = cells(report.table())
    assert header[3:] == [
        *("Seeds", "mAP", "Rank-1", "mINP"),
        *("Minutes", "Memory (MiB)", "Clusters"),
    ]
    # The deviation of two values is their distance over the root of 2: 3 / 1.414.
    figures = ["51.5 ± 2.1", "71.5 ± 2.1", "21.5 ± 2.1", "1.5 ± 0.0", "500", "102 ± 2"]
    assert scl == ["scl", "SelectiveContrastive", "Market1501", "2", *figures]
    assert cc[3:] == ["1 of 2", "40.0", "60.0", "10.0", "1.5", "2048 (GPU)", "-"]
    assert len({len(line) for line in report.table().splitlines()}) == 1  # aligned


def test_notes_name_failures_machine_and_command():
    outcomes = [Outcome(run(), record()), Outcome(run(seed=1), error="exit status 1: why")]
    notes = "\n".join(Report(outcomes, 2, "selcon bench --configs a.yml").notes())
    assert "sample standard deviation over seeds 0 to 1" in notes
    assert "**scl seed 1 failed:** exit status 1: why" in notes
    assert "a processor, 2 threads; python 3.11, torch 2.13." in notes
    assert "`selcon bench --configs a.yml`" in notes
    assert "budget" not in notes  # there is nothing to compare with
    one = "\n".join(Report(outcomes[:1], 1, "").notes())
    assert "±" not in one
    assert "one run with seed 0" in one


def test_files_hold_the_same_figures(tmp_path):
    outcomes = [Outcome(run(), record(50.0)), Outcome(run(seed=1), record(53.0))]
    report = Report(outcomes, 2, "selcon bench")
    report.write(tmp_path)
    assert report.table() in (tmp_path / "table.md").read_text(encoding="utf-8")
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["rows"] == summarize(outcomes, 2)
    assert [row["seed"] for row in content["runs"]] == [0, 1]
    assert content["runs"][1]["metrics"]["Market1501"]["mAP"] == 53.0
    with (tmp_path / "table.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["mAP_mean"]) == 51.5
    assert row["clusters_mean"] == ""
    assert not list(tmp_path.glob("*.partial"))


# --- fairness -----------------------------------------------------------------------------


def test_differences_name_key_and_values():
    settings = {
        "a": {"SOLVER.MAX_EPOCH": 20, "INPUT.SIZE_TRAIN": [128, 64], "OUTPUT_DIR": "x"},
        "b": {"SOLVER.MAX_EPOCH": 20, "INPUT.SIZE_TRAIN": [256, 128], "OUTPUT_DIR": "y"},
        "c": {"INPUT.SIZE_TRAIN": [128, 64]},
    }
    assert differences(settings) == {
        "INPUT.SIZE_TRAIN": {"a": [128, 64], "b": [256, 128], "c": [128, 64]},
        "SOLVER.MAX_EPOCH": {"a": 20, "b": 20, "c": None},
    }
    assert differences({"a": settings["a"]}) == {}


def test_recipes_may_differ_and_budgets_are_named():
    recipe = differences({"a": {"SOLVER.BASE_LR": 1.0}, "b": {"SOLVER.BASE_LR": 2.0}})
    assert budget_notes(recipe)[0].startswith("* Same budget")
    epochs = differences({"a": {"SOLVER.MAX_EPOCH": 20}, "b": {"SOLVER.MAX_EPOCH": 30}})
    assert budget_notes(recipe | epochs) == [
        "* **The budgets differ:**",
        "  * SOLVER.MAX_EPOCH: a 20, b 30",
    ]


@pytest.mark.parametrize(
    "key",
    [
        *("MODEL.BACKBONE.NAME", "MODEL.BACKBONE.PRETRAIN_PATH", "MODEL.WEIGHTS"),
        *("INPUT.SIZE_TRAIN", "INPUT.SIZE_TEST", "DATASETS.NAMES", "DATASETS.TESTS"),
        *("SOLVER.MAX_EPOCH", "SOLVER.IMS_PER_BATCH", "SOLVER.AMP.ENABLED"),
        *("TEST.FLIP.ENABLED", "TEST.RERANK.ENABLED", "MODEL.SELCON.TEST_CAMERA_TERM"),
    ],
)
def test_budget_covers(key):
    assert len(budget_notes({key: {"a": 1, "b": 2}})) == 2


def test_steps_count_once_all_configs_have_finished_a_run():
    outcomes = [Outcome(run(), record(steps=100)), Outcome(run("cc"), error="why")]
    assert Report(outcomes, 1, "").differing() == {}
    outcomes[1] = Outcome(run("cc"), record(steps=150))
    assert Report(outcomes, 1, "").differing() == {
        "steps of training": {"scl": 100, "cc": 150}
    }

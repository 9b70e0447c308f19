"""Tests of the bench's table, which is built from the records of runs."""

import csv
import json
import re
from pathlib import Path

import pytest

from selcon_plugin.workflows.bench_latex import latex_text
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
    metrics = {"mAP": m_ap, "Rank-1": m_ap + 20, "Rank-5": m_ap + 30, "mINP": m_ap - 30}
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
    folder = Path("out") / config / f"seed{seed}"
    network = {"backbone": "osnet_x1_0", "input_size": "256x128"}
    return Run(config, seed, folder, settings, **network, supervised="superv" in config)


# --- aggregation --------------------------------------------------------------------------


def test_mean_and_sample_deviation_computed_by_hand():
    # Deviations from 4 are -2, 0, 2: (4 + 0 + 4) / (3 - 1) = 4, whose root is 2.
    assert mean_and_std([2.0, 4.0, 6.0]) == (4.0, 2.0)
    assert mean_and_std([3.0]) == (3.0, None)
    assert mean_and_std([]) == (None, None)


def test_rows_computed_by_hand():
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


def test_each_test_set_has_a_row_and_so_has_a_config_without_one():
    two = {name: {"mAP": 1.0, "Rank-1": 2.0, "mINP": 3.0} for name in ("A", "B")}
    rows = summarize([Outcome(run(), record(metrics=two))], 1)
    assert [row["test_set"] for row in rows] == ["A", "B"]
    (row,) = summarize([Outcome(run(), record(metrics={}))], 1)
    assert row["mAP_mean"] is None
    assert row["minutes_mean"] == 1.5


# --- the table ----------------------------------------------------------------------------


def cells(table):
    """Return the header and the rows of a Markdown table, without the rule between."""
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def test_table_shows_the_known_values():
    outcomes = [
        Outcome(run(seed=0), record(50.0, num_clusters=100)),
        Outcome(run("cc", seed=0), record(40.0, peak_gpu_memory_mib=2048.4)),
        Outcome(run(seed=1), record(53.0, num_clusters=103)),
        Outcome(run("cc", seed=1), error="exit status 1: it broke"),
    ]
    report = Report(outcomes, 2, "selcon bench")
    header, scl, cc = cells(report.table())
    assert header[2:] == [
        *("Backbone", "Input", "Test set", "Seeds"),
        *("mAP", "Rank-1", "Rank-5", "Rank-10", "mINP"),
        *("Minutes", "Memory (MiB)", "Clusters"),
    ]
    # The deviation of two values is their difference over the root of 2: 3 / 1.414.
    values = ["51.5 ± 2.1", "71.5 ± 2.1", "81.5 ± 2.1", "-", "21.5 ± 2.1", "1.5 ± 0.0"]
    named = ["scl", "SelectiveContrastive", "osnet_x1_0", "256x128", "Market1501", "2"]
    assert scl == [*named, *values, "500", "102 ± 2"]
    values = ["40.0", "60.0", "70.0", "-", "10.0", "1.5", "2048 (GPU)", "-"]
    assert cc[5:] == ["1 of 2", *values]
    assert len({len(line) for line in report.table().splitlines()}) == 1  # aligned


def test_notes_name_failures_machine_and_command():
    outcomes = [Outcome(run(), record()), Outcome(run(seed=1), error="exit status 1: why")]
    notes = "\n".join(Report(outcomes, 2, "selcon bench --configs a.yml").notes())
    assert "sample standard deviation over seeds 0 to 1" in notes
    assert "**scl seed 1 failed:** exit status 1: why" in notes
    assert "a processor, 2 threads; python 3.11, torch 2.13." in notes
    assert "`selcon bench --configs a.yml`" in notes
    assert "budget" not in notes  # there is only one config
    one = "\n".join(Report(outcomes[:1], 1, "").notes())
    assert "±" not in one
    assert "one run with seed 0" in one


def test_all_files_contain_the_same_metrics(tmp_path):
    outcomes = [Outcome(run(), record(50.0)), Outcome(run(seed=1), record(53.0))]
    report = Report(outcomes, 2, "selcon bench")
    report.write(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert report.table() in text
    assert report.seeds_table() in text
    assert (tmp_path / "table.tex").read_text(encoding="utf-8") == report.latex()
    with (tmp_path / "runs.csv").open() as stream:
        runs = list(csv.DictReader(stream))
    assert [(run["seed"], float(run["mAP"])) for run in runs] == [("0", 50.0), ("1", 53.0)]
    assert runs[0]["Rank-10"] == ""
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["rows"] == summarize(outcomes, 2)
    assert [row["seed"] for row in content["runs"]] == [0, 1]
    assert content["runs"][1]["metrics"]["Market1501"]["mAP"] == 53.0
    with (tmp_path / "table.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["mAP_mean"]) == 51.5
    assert row["clusters_mean"] == ""
    assert not list(tmp_path.glob("*.partial"))


# --- fair comparison ----------------------------------------------------------------------


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


def test_recipes_may_differ_and_budget_differences_are_listed():
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


# --- one row per seed, and LaTeX ----------------------------------------------------------


def test_each_seed_has_its_values_and_a_failed_one_a_row():
    outcomes = [
        Outcome(run(seed=0), record(50.0, num_clusters=100)),
        Outcome(run(seed=1), error="exit status 1: it broke"),
    ]
    header, first, failed = cells(Report(outcomes, 2, "selcon bench").seeds_table())
    assert header == [
        *("Config", "Test set", "Seed", "mAP", "Rank-1", "Rank-5", "Rank-10", "mINP"),
        *("Minutes", "Clusters"),
    ]
    values = ["50.0", "70.0", "80.0", "-", "20.0", "1.5", "100"]
    assert first == ["scl", "Market1501", "0", *values]
    assert failed == ["scl", "-", "1", *["-"] * 7]


def test_bar_in_a_name_does_not_split_a_cell():
    table = Report([Outcome(run("a|b"), record())], 1, "").table()
    assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1


def latex_rows(text):
    """Return the cells of a table in LaTeX, and check the parts around them."""
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    for rule in ("top", "bottom"):
        assert text.count(f"\\{rule}rule") == 1
    body = text[text.index(r"\toprule") :]
    lines = [line.strip() for line in body.splitlines() if line.endswith(r"\\")]
    return [[c.strip() for c in re.split(r"(?<!\\)&", line[:-2])] for line in lines]


def test_latex_has_the_values_and_is_escaped():
    outcomes = [
        *(Outcome(run("50%_a&b", seed), record(50.0 + seed)) for seed in (0, 1)),
        *(Outcome(run("cc", seed), record(40.0 + seed)) for seed in (0, 1)),
        *(Outcome(run("supervised (X)", seed), record(80.0 + seed)) for seed in (0, 1)),
    ]
    text = Report(outcomes, 2, "selcon bench --configs 50%_a&b.yml").latex()
    header, first, second, reference = latex_rows(text)
    assert header == [
        *("Config", "Method", "Backbone", "Input", "Test set", "Seeds"),
        *("mAP", "Rank-1", "Rank-5", "mINP"),  # no run has Rank-10
    ]
    assert first[0] == r"50\%\_a\&b"
    assert first[2:6] == [r"osnet\_x1\_0", "256x128", "Market1501", "2"]
    assert first[6] == r"$\mathbf{50.5} \pm 0.7$"
    assert second[6] == r"$40.5 \pm 0.7$"
    assert reference[6] == r"$80.5 \pm 0.7$"  # not bold: it was trained with identities
    assert text.count(r"\midrule") == 2
    columns = re.search(r"begin\{tabular\}\{([lr]+)\}", text)[1]
    assert len(columns) == len(header)
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert any("selcon bench --configs" in line for line in comments)


def test_latex_of_one_seed_has_no_deviation():
    text = Report([Outcome(run(), record(50.0))], 1, "").latex()
    assert r"\pm" not in text
    assert latex_rows(text)[1][6] == "$50.0$"


def test_latex_text_of_every_special_character():
    assert latex_text("\\{}~^$#") == (
        r"\textbackslash{}\{\}\textasciitilde{}\textasciicircum{}\$\#"
    )
    assert latex_text("two\nlines") == "two lines"


def test_reference_is_explained():
    outcomes = [Outcome(run("supervised (X)"), record())]
    assert "true identities" in "\n".join(Report(outcomes, 1, "").notes())
    assert "true identities" not in "\n".join(
        Report([Outcome(run(), record())], 1, "").notes()
    )

"""The bench as a user runs it: real runs in processes of their own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from helpers import programs
from selcon_plugin.cli.bench import main
from selcon_plugin.config.checks import flatten_config
from selcon_plugin.hosts import get_host
from selcon_plugin.workflows import bench, bench_runs
from selcon_plugin.workflows.bench_runs import progress
from selcon_plugin.workflows.bench_table import METRICS

EPOCHS = 3


def run_bench(*arguments):
    """Run the bench in this process; return its exit status and what it printed."""
    output = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(output),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(subprocess, "Popen", programs.popen)
        warnings.simplefilter("default")  # pytest makes errors of what FastReID warns of
        status = main([str(argument) for argument in arguments])
    return status, output.getvalue()


def write_config(file, values):
    nested = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[last] = list(value) if isinstance(value, tuple) else value
    file.write_text(yaml.safe_dump(nested))
    return file


@dataclass
class Story:
    """Two configs on two seeds: stopped in the second run, and resumed."""

    arguments: list
    output: Path
    first: tuple[int, str]
    second: tuple[int, str]
    kept: int  # when the results of the first run were written
    files_when_stopped: set[str]


@pytest.fixture(scope="module")
def told():
    """Results that the next fixture keeps for the tests of this file."""
    return []


@pytest.fixture
def story(told, tiny_values, tmp_path_factory):
    if not told:
        told.append(tell(tiny_values, tmp_path_factory.mktemp("bench")))
    return told[0]


def tell(tiny, folder):
    write_config(folder / "plain.yml", tiny)
    write_config(folder / "bare.yml", tiny | {"MODEL.SELCON.NUM_PARTS": 0})
    output = folder / "out"
    arguments = ["--configs", folder / "plain.yml", folder / "bare.yml", "--seeds", 2]
    arguments += ["--epochs", EPOCHS, "--dataset", "SyntheticPersons", "--output", output]
    second_run = output / "bare" / "seed0"

    signals = [signal.SIGTERM]

    def stop_in_the_second_run(_text):
        if signals and (second_run / "model_0000.pth").exists():
            os.kill(os.getpid(), signals.pop())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_runs, "_POLL_SECONDS", 0.05)
        patch.setattr(bench_runs, "show_status", stop_in_the_second_run)
        first = run_bench(*arguments)
    kept = (output / "plain" / "seed0" / "results.json").stat().st_mtime_ns
    files_when_stopped = {file.name for file in second_run.iterdir()}
    second = run_bench(*arguments)
    return Story(arguments, output, first, second, kept, files_when_stopped)


def results_of(story, name, seed):
    return json.loads((story.output / name / f"seed{seed}" / "results.json").read_text())


def test_stopped_bench_resumes_where_it_stopped(story):
    status, text = story.first
    assert status == 143  # SIGTERM
    assert "Stopped. The same command resumes" in text
    assert "results.json" not in story.files_when_stopped
    status, text = story.second
    assert status == 0
    assert "[1/4] plain seed 0: finished earlier" in text
    finished = story.output / "plain" / "seed0" / "results.json"
    assert finished.stat().st_mtime_ns == story.kept
    console = (story.output / "bare" / "seed0" / "console.txt").read_text()
    begins = [line for line in console.splitlines() if "Starting training from" in line]
    assert begins[0].endswith("epoch 0")
    assert not begins[-1].endswith("epoch 0")


def test_table_holds_the_metrics_of_the_runs(story):
    table, _per_seed, _notes = (story.output / "table.md").read_text().split("\n\n")
    header, _rule, *lines = table.splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    rows = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = dict(zip(columns, cells, strict=True))
    assert list(rows) == ["plain", "bare"]
    for name, row in rows.items():
        assert row["Seeds"] == "2"
        first, second = (results_of(story, name, seed) for seed in (0, 1))
        for metric in METRICS:
            x, y = (r["metrics"]["SyntheticPersons"][metric] for r in (first, second))
            # Of two values the sample deviation is their distance over the root of 2.
            spread = abs(x - y) / 2**0.5
            assert row[metric] == f"{(x + y) / 2:.1f} ± {spread:.1f}"
        peak = max(first["peak_memory_mib"], second["peak_memory_mib"])
        assert row["Memory (MiB)"] == f"{peak:.0f}"
        assert row["Clusters"] == "-"
    _, text = story.second
    assert header in text


def test_runs_are_of_the_given_budget_data_and_seed(story):
    for name in ("plain", "bare"):
        for seed in (0, 1):
            record = results_of(story, name, seed)
            assert (record["seed"], record["epochs"]) == (seed, EPOCHS)
            assert record["steps"] == EPOCHS * 5
            assert list(record["metrics"]) == ["SyntheticPersons"]
    first, second = (results_of(story, "plain", seed) for seed in (0, 1))
    assert first["metrics"] != second["metrics"]
    content = json.loads((story.output / "table.json").read_text())
    assert content["differences"] == {"MODEL.SELCON.NUM_PARTS": {"plain": 2, "bare": 0}}
    assert "* Same budget" in (story.output / "table.md").read_text()


def test_finished_bench_only_reads(story, monkeypatch):
    def begin(_run):
        raise AssertionError("a finished run began again")

    monkeypatch.setattr(bench_runs, "_command", begin)
    before = (story.output / "table.csv").read_text()
    status, text = run_bench(*story.arguments, "DATALOADER.NUM_WORKERS", "1")
    assert status == 0
    assert text.count("finished earlier") == 4
    assert (story.output / "table.csv").read_text() == before


def test_run_with_other_settings_is_refused(story):
    settings = story.output / "plain" / "seed0" / "bench.yaml"
    before = settings.read_text()
    words = r"seed0 contains a run with other settings \(SOLVER.BASE_LR: 0.02 then, 0.5 "
    with pytest.raises(ValueError, match=words + r"now\): remove that folder .* --output"):
        run_bench(*story.arguments, "SOLVER.BASE_LR", "0.5")
    assert settings.read_text() == before


def test_folder_of_another_run_is_refused(tiny_values, tmp_path):
    config = write_config(tmp_path / "a.yml", tiny_values)
    folder = tmp_path / "out" / "a" / "seed0"
    folder.mkdir(parents=True)
    (folder / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(ValueError, match="the bench did not start"):
        run_bench("--configs", config, "--seeds", 1, "--output", tmp_path / "out")


def test_failed_run_is_reported_and_does_not_end_the_others(tiny_values, tmp_path):
    tiny = tiny_values | {"SOLVER.MAX_EPOCH": 1}
    broken = write_config(tmp_path / "broken.yml", tiny | {"SOLVER.IMS_PER_BATCH": 48})
    good = write_config(tmp_path / "good.yml", tiny)
    output = tmp_path / "out"
    arguments = ["--configs", broken, good, "--seeds", 1, "--output", output]
    status, text = run_bench(*arguments)
    assert status == 1
    reason = "40 training images do not fill one batch"
    assert "[1/2] broken seed 0: FAILED: exit status 2" in text
    assert "[2/2] good seed 0: in " in text
    table = (output / "table.md").read_text()
    assert (
        f"**broken seed 0 failed:** exit status 2: selcon train: error: {reason}" in table
    )
    assert "0 of 1" in table
    assert (output / "good" / "seed0" / "results.json").exists()


def test_second_bench_in_a_folder_is_refused_and_the_first_one_ends_unharmed(
    tiny_values, tmp_path, monkeypatch
):
    config = write_config(tmp_path / "a.yml", tiny_values | {"SOLVER.MAX_EPOCH": 1})
    output = tmp_path / "out"
    arguments = ["--configs", config, "--seeds", 1, "--output", output]
    seconds = []

    def begin_a_second_one(_text):
        if not seconds:
            before = content(output)
            seconds.append(programs.run_program("-m", "selcon_plugin", "bench", *arguments))
            assert content(output) == before

    def content(folder):
        return {file: file.read_bytes() for file in folder.glob("**/bench.yaml")}

    monkeypatch.setattr(bench_runs, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(bench_runs, "show_status", begin_a_second_one)
    status, text = run_bench(*arguments)
    assert seconds[0].returncode == 2
    error = seconds[0].stderr.strip().splitlines()[-1]
    for part in (f"{output} is in use by", f"process {os.getpid()} ", "another output"):
        assert part in error
    assert (status, "[1/1] a seed 0: in " in text) == (0, True)
    assert "1 of 1" not in (output / "table.md").read_text()  # none failed
    assert (output / "a" / "seed0" / "results.json").exists()
    assert not list(output.glob(".*"))


@pytest.mark.parametrize(
    ("log", "text"),
    [
        ("Loading checkpoint", "1 min 15 s, starting"),
        (" epoch/iter: 0/4  total_loss: 1", "epoch 1/20, 1 min 15 s"),
        ("eta: 0:00:09  epoch/iter: 2/14  loss", "epoch 3/20, 1 min 15 s, 9.0 s left"),
        (
            "eta: 0:00:09  epoch/iter: 2/14 \neta: 1 day, 2:03:04  epoch/iter: 3/19  ",
            "epoch 4/20, 1 min 15 s, 26 h 3 min left",
        ),
    ],
)
def test_progress_is_read_from_the_log(log, text):
    assert progress(log, 20, 75.0, get_host("fastreid").run_files) == text


@pytest.mark.parametrize(
    ("key", "value"), [("OUTPUT_DIR", "x"), ("MODEL.SELCON.SEED", "7")]
)
def test_keys_that_the_bench_sets_are_refused(tiny_values, tmp_path, key, value):
    config = write_config(tmp_path / "a.yml", tiny_values)
    with pytest.raises(ValueError, match=f"{key} is set by --output and --seeds"):
        run_bench("--configs", config, "--output", tmp_path / "out", key, value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MODEL.META_ARCHITECTURE": "Baseline"}, r"a\.yml: MODEL.META_ARCHITECTURE is"),
        ({"DATASETS.NAMES": ("Nowhere",)}, r"DATASETS\.NAMES 'Nowhere' is unknown: Known"),
        ({"MODEL.SELCON.TEMPERATURE": 0.0}, "TEMPERATURE"),
    ],
)
def test_mistake_in_a_config_is_found_before_anything_runs(
    tiny_values, tmp_path, changes, words
):
    config = write_config(tmp_path / "a.yml", tiny_values | changes)
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=words):
        run_bench("--configs", config, "--output", output)
    assert not output.exists()


def test_options_may_follow_the_configs(tiny_values, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_work", lambda *_: [])
    config = write_config(tmp_path / "a.yml", tiny_values)
    for rate in ("0.5", "0.25"):  # settings may change until a run has something to lose
        option = ["SOLVER.BASE_LR", rate]
        status, _ = run_bench("--configs", config, *option, "--output", tmp_path / "out")
        assert status == 0
    for seed in range(3):  # the default
        text = (tmp_path / "out" / "a" / f"seed{seed}" / "bench.yaml").read_text()
        settings = flatten_config(yaml.safe_load(text))
        assert settings["SOLVER.BASE_LR"] == 0.25
        assert settings["MODEL.SELCON.SEED"] == seed

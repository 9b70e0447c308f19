"""JSON of a run with other types than it was written with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selcon_plugin.report import collect_run, write_report
from selcon_plugin.runs.metrics import read_metrics
from selcon_plugin.runs.results import read_results

OLD_RUN = Path(__file__).parents[1] / "old_runs" / "fastreid"
RESULTS = json.loads((OLD_RUN / "results.json").read_text())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "x"),
        ("steps", 1.5),
        ("epochs", True),
        ("epochs", -1),
        ("epochs", 10**30),
        ("num_images", [1]),
        ("metrics", []),
        ("metrics", {"set": 3}),
        ("metrics", {"set": {"mAP": [1]}}),
        ("metrics", {"set": {"mAP": float("nan")}}),
        ("train_seconds", float("inf")),
        ("peak_memory_mib", "1"),
        ("method", 3),
        ("versions", []),
    ],
)
def test_results_of_another_type_are_refused_by_file_and_entry(name, value, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**RESULTS, name: value}))
    with pytest.raises(ValueError, match=rf"results\.json is damaged: {name} is"):
        read_results(file)
    with pytest.raises(ValueError, match=rf"results\.json is damaged: {name} is"):
        collect_run(tmp_path)
    # With other files of the run, the report is written without this one.
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 2}\n')
    run = collect_run(tmp_path)
    assert run.results == {}
    assert name in run.broken[0]


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "\0", "[" * 100_000])
def test_results_that_are_no_object(text, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        read_results(file)


def test_results_as_they_are_written():
    assert read_results(OLD_RUN / "results.json") == RESULTS


def test_metrics_keep_finite_numbers_only(tmp_path):
    file = tmp_path / "metrics.json"
    lines = [
        '{"iteration": 1, "a": NaN, "b": 2, "c": "x", "d": true, "e": 1e999, "f": [1]}',
        '{"iteration": true, "b": 1}',
        '{"iteration": "2", "b": 1}',
        "[1]",
        "null",
        '{"iteration": 3, "b": ' + "9" * 400 + "}",
    ]
    file.write_text("\n".join(lines))
    assert read_metrics(file) == [{"iteration": 1, "b": 2}, {"iteration": 3}]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("images.json", '"images": [', '"images": [[], '),
        ("images.json", '"images"', '"pictures"'),
        ("ranked.json", '"pid": ', f'"pid": {10**30}, "unused": '),
        ("config.yaml", "MODEL:", "MODEL: 3\nOTHER:"),
        ("config.yaml", "MODEL:", "MODEL: [\nOTHER:"),
    ],
)
def test_report_of_a_run_with_a_damaged_file_is_written(file, old, new, tmp_path):
    for path in OLD_RUN.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (OLD_RUN / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    assert write_report(tmp_path, images=False).is_file()

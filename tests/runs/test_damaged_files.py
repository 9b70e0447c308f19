"""JSON of a run with other types than it was written with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from selcon_plugin.cli import main
from selcon_plugin.report import collect_run, write_report
from selcon_plugin.runs.metrics import append_metrics, begin_metrics, read_metrics
from selcon_plugin.runs.ranked import rank_queries, read_ranked, write_ranked
from selcon_plugin.runs.results import RunMeter, read_results, write_results

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


@pytest.fixture
def written(tmp_path):
    """Make a folder with the records as the package writes them."""
    write_results(
        tmp_path,
        method="SelCon",
        seed=3,
        num_images=40,
        epochs=2,
        steps=10,
        metrics={"few": {"mAP": 12.5, "Rank-1": 31.25}},
        meter=RunMeter(),
        num_clusters=None,
        device=torch.device("cpu"),
        host="torch",
    )
    gallery = [("a.jpg", 2, 1), ("b.jpg", 1, 1), ("c.jpg", 1, 2)]
    queries = [("q.jpg", 1, 0), ("other.jpg", 9, 0)]
    write_ranked(tmp_path, "few", rank_queries([[0.1, 0.2, 0.3]] * 2, queries, gallery))
    begin_metrics(tmp_path, "0123")
    append_metrics(tmp_path, 4, {"total_loss": 2.5, "lr": 0.1})
    append_metrics(tmp_path, 9, {"total_loss": 1.5, "lr": 0.1})
    return tmp_path


READERS = {
    "results.json": lambda folder: read_results(folder / "results.json"),
    "ranked.json": read_ranked,
    "metrics.json": lambda folder: read_metrics(folder / "metrics.json"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_changed_digit_is_noticed(name, written, caplog):
    file, read = written / name, READERS[name]
    text = file.read_text()
    before = read(written)
    assert "damaged" not in caplog.text
    places = [match.start() for match in re.finditer(r"\d", text)]
    assert len(places) > 50
    for place in places:
        digit = str((int(text[place]) + 1) % 10)
        file.write_text(text[:place] + digit + text[place + 1 :])
        caplog.clear()
        try:
            found = read(written)
        except ValueError as error:
            message = str(error)
        else:
            assert all(line in before for line in found)
            message = caplog.text
        assert re.search(rf"{re.escape(name)} is damaged: .*\. [A-Z]", message), place


def test_a_list_that_lost_an_entry_is_noticed(written):
    file = written / "ranked.json"
    content = json.loads(file.read_text())
    content["few"][0]["results"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"ranked\.json is damaged: .*checksum"):
        read_ranked(written)


def test_the_other_lines_of_damaged_metrics_are_kept(written, caplog):
    file = written / "metrics.json"
    file.write_text(file.read_text().replace("2.5", "9.5") + '{"iteration": 14, "lr": 0.')
    assert read_metrics(file) == [{"iteration": 9, "total_loss": 1.5, "lr": 0.1}]
    # The line that a kill cut off is no damage.
    assert "1 of its lines" in caplog.text
    assert "line 2" in caplog.text


@pytest.mark.parametrize("text", ["[1, 2]", "3", "null", '"text"'])
@pytest.mark.parametrize(
    "name", ["results.json", "metrics.json", "ranked.json", "images.json", "config.yaml"]
)
def test_report_names_each_file_of_another_top_type(name, text, tmp_path, capsys, caplog):
    for path in OLD_RUN.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if (name, text) == ("config.yaml", "null"):
        text = "[]"  # null is an empty config, which is legal
    (tmp_path / name).write_text(text + "\n")
    assert main(["report", str(tmp_path), "--no-images"]) == 0
    assert str(tmp_path / name) in caplog.text
    page = (tmp_path / "report.html").read_text()
    assert f"{name} is damaged" in page
    assert "has not finished" not in page


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

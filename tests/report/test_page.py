"""Tests of the page: its content, the escaping of all values, and its size."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from selcon_plugin.report import (
    collect_run,
    crops,
    finish_run,
    write_comparison,
    write_report,
)
from selcon_plugin.report.charts import Series, line_chart, ticks
from selcon_plugin.report.crops import Crops
from selcon_plugin.report.document import Section, Table, render_page
from selcon_plugin.report.embedding_map import lay_out
from selcon_plugin.report.page import run_page
from selcon_plugin.runs.embedding import OTHER_CAMERA, EmbeddingRecord
from selcon_plugin.runs.ranked import RankedImage, RankedQuery, read_ranked, write_ranked

_VOID = {"meta", "img", "input", "br", "link", "path", "circle"}


class Outline(html.parser.HTMLParser):
    """The tags, ids and text of a page; fails if elements are not nested correctly."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def report(folder, **options):
    return write_report(folder, **options).read_text(encoding="utf-8")


def test_a_page_has_all_parts(make_run):
    outline = Outline(report(make_run()))
    sections = [s["id"] for s in outline.of("section")]
    assert sections == [
        *(
            "summary",
            "curves",
            "map",
            "clusters",
            "distances",
            "ranked",
            "settings",
            "about",
        )
    ]
    text = " ".join(outline.text)
    for expected in (
        "61.2 %",
        "No warnings",
        "1 min 15 s",
        "eps 0.6",
        "ClusterContrast",
        "2.13",
    ):
        assert expected in text
    links = [a["href"] for a in outline.of("a")]
    ids = {attrs["id"] for _, attrs in outline.tags if "id" in attrs}
    assert {link.removeprefix("#") for link in links} <= ids


def test_the_markup_of_a_page_is_accessible(make_run):
    outline = Outline(report(make_run()))
    assert outline.of("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in outline.of("img"))
    for svg in outline.of("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert {"main", "nav", "header", "footer"} <= {tag for tag, _ in outline.tags}
    # Every radio button has a label, and every row and column a heading.
    assert {i["id"] for i in outline.of("input")} == {x["for"] for x in outline.of("label")}
    assert all(th["scope"] in ("col", "row") for th in outline.of("th"))


def test_a_page_makes_no_requests(make_run):
    page = report(make_run())
    outline = Outline(page)
    for _, attrs in outline.tags:
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!data:)|@import|fetch\(|XMLHttp|https?://", page)
    assert "default-src 'none'" in outline.of("meta")[1]["content"]


def test_names_and_values_are_escaped(make_run):
    folder = make_run(NOTE="</script><script>alert(1)</script><img src=x>")
    (folder / "results.json").write_text(
        '{"method": "<i>bold</i>", "versions": {"<u>": 1}}'
    )
    page = report(folder)
    outline = Outline(page)
    assert len(outline.of("script")) == 2
    for tag in ("b", "i", "u"):
        assert not outline.of(tag)
    assert "<b>&'\"x.png" in {image["alt"].split(",")[0] for image in outline.of("img")}


def test_data_of_the_map_cannot_end_its_script(make_run):
    page = report(make_run())
    (data,) = re.findall(r'id="map-data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in data
    assert json.loads(data)["points"][0][2] == "<b>&'\"x.png"


def test_sections_name_their_headings(make_run):
    outline = Outline(report(make_run()))
    labels = {section["aria-labelledby"] for section in outline.of("section")}
    assert labels == {heading["id"] for heading in outline.of("h2")}


def test_a_template_that_lacks_a_value_is_an_error():
    sections = [Section("about", "About", {"rows": []})]
    texts = {"title": "a", "heading": "a", "subtitle": "a"}
    with pytest.raises(UndefinedError, match="head"):
        render_page("run.html.j2", **texts, sections=sections)


def test_undecodable_bytes_of_a_name_are_replaced():
    texts = {"title": "a", "heading": "a\udcffb", "subtitle": "a"}
    assert "<h1>a?b</h1>" in render_page("compare.html.j2", **texts, sections=[])


def test_only_a_page_with_a_script_allows_one(make_run, tmp_path):
    assert "script-src" in report(make_run("a"))
    runs = [tmp_path / "a", make_run("b")]
    page = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "script-src" not in page
    assert not Outline(page).of("script")


def test_no_images_leaves_every_crop_out(make_run):
    folder = make_run()
    page = report(folder, images=False)
    assert "data:image" not in page
    assert not Outline(page).of("img")
    assert "data:image" in report(folder, images=None)
    private = make_run("private", REPORT_IMAGES=False)
    assert "data:image" not in report(private)
    assert "data:image" in report(private, images=True)


def test_missing_crops_are_replaced_by_their_names(make_run):
    folder = make_run()
    for file in folder.glob("*.png"):
        file.unlink()
    outline = Outline(report(folder))
    assert not outline.of("img")
    assert any("c1_01.png" in text for text in outline.text)


def test_embedded_images_stay_within_the_size_limit(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(40):
        paths.append(str(tmp_path / f"{i}.png"))
        noise = rng.integers(0, 256, (128, 64, 3), dtype=np.uint8)  # incompressible
        Image.fromarray(noise).save(paths[-1])
    monkeypatch.setattr(crops, "MAX_CROP_BYTES", 50_000)
    monkeypatch.setattr(crops, "MAX_SPRITE_BYTES", 120_000)
    made = Crops()
    uris = [made.uri(path) for path in paths]
    assert 0 < sum(map(len, uris)) <= 50_000
    assert [made.uri(path) for path in paths] == uris
    sprite = made.sprite(paths)
    assert sprite is not None
    assert len(sprite.uri) <= 120_000
    monkeypatch.setattr(crops, "MAX_SPRITE_BYTES", 1000)
    assert Crops().sprite(paths) is None


def test_the_largest_report_is_below_ten_megabytes():
    """Check the bound: images are limited, and so are the map's 2,000 points and names."""
    point = '[123.4,567.8,"' + "x" * 250 + '",12345,123],'
    marks = 2 * 2000 * 60
    text = 2000 * len(point) + marks + 500_000  # tables, curves, settings
    assert crops.MAX_CROP_BYTES + crops.MAX_SPRITE_BYTES + text < 10_000_000


def test_nearest_neighbors_replace_missing_ranked_results(make_run):
    folder = make_run(ranked=False, identities=False)
    (folder / "ranked.json").unlink(missing_ok=True)
    text = " ".join(Outline(report(folder)).text)
    assert "Nearest neighbors" in text
    assert "no test set" in text
    assert "true identit" not in text
    assert "true identit" in " ".join(Outline(report(make_run("known"))).text)


def test_a_method_without_clusters_has_a_map_by_camera(make_run):
    page = report(make_run(clustered=False))
    outline = Outline(page)
    assert [i["value"] for i in outline.of("input")] == ["camera"]
    assert "cosine distance" in " ".join(outline.text)
    assert "clusters" not in [s["id"] for s in outline.of("section")]


def test_a_run_with_few_and_damaged_records(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 4, "total_loss": 1.5}\n{"itera')
    (tmp_path / "embedding.npz").write_bytes(b"PK no archive")
    (tmp_path / "images.json").write_text("[]")
    text = " ".join(Outline(report(tmp_path)).text)
    assert "has not finished" in text
    assert text.count("could not be read") == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"contains no run.*OUTPUT_DIR"):
        write_report(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        write_report(tmp_path / "gone")


def test_a_record_of_other_images_is_not_shown(make_run):
    folder = make_run()
    content = json.loads((folder / "images.json").read_text())
    content["images"].pop()
    (folder / "images.json").write_text(json.dumps(content))
    run = collect_run(folder)
    assert run.embedding is None
    assert run.broken == ("the recorded features belong to other images",)


def test_settings_that_differ_are_marked(make_run):
    folder = make_run(SEED=3, EMA_DECAY=0.0)
    defaults = {"MODEL.SELCON.SEED": 0, "MODEL.SELCON.EMA_DECAY": 0.0}
    host = SimpleNamespace(name="fastreid", default_values=lambda _: defaults)
    text = " ".join(Outline(report(folder, find_host=lambda _: host)).text)
    top, full = text.split("The full config")
    assert "MODEL.SELCON.SEED 3 0" in top
    assert "EMA_DECAY" not in top
    assert "MODEL.SELCON.SEED 3 changed" in full


def test_curves_are_over_epochs_and_end_with_the_run(make_run):
    run = collect_run(make_run())
    assert run.curve("num_clusters").epochs == (0.0, 1.0, 2.0)
    assert run.curve("total_loss").epochs == (1.0, 2.0, 3.0)
    assert run.curve("total_loss").values == (3.0, 2.0, 1.0)
    assert run.curve("mAP").epochs == (3.0,)
    with (run.folder / "metrics.json").open("a") as stream:
        stream.write('\n{"iteration": 39, "total_loss": 9.0}')  # left by a longer run
    assert collect_run(run.folder).curve("total_loss").epochs[-1] == 3.0


def test_comparison(make_run, tmp_path):
    runs = [make_run("a", SEED=0), make_run("b", SEED=1)]
    page = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    outline = Outline(page)
    text = " ".join(outline.text)
    assert "MODEL.SELCON.SEED 0 1" in text
    assert "METHOD" not in text  # it is the same
    assert text.count("61.2 %") == 2
    assert "data:image" not in page
    for bad in ([runs[0]], [runs[0], runs[0]]):
        with pytest.raises(ValueError, match="at least two runs"):
            write_comparison(bad, tmp_path / "d.html")


def test_a_report_that_fails_is_a_warning(make_run, monkeypatch, caplog):
    folder = make_run()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("selcon_plugin.report.write_report", fail)
    finish_run(folder)
    assert "disk full" in caplog.text
    finish_run("")


# --- charts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3, 3), (-0.2, 0.35), (1e-7, 2e-2), (0, 0)]
)
def test_ticks_enclose_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 13
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])


def test_a_chart_shows_its_values_at_their_positions():
    chart = line_chart([Series("a", [0, 10], [0.0, 4.0])], title="T", x_label="x")
    assert chart is not None
    assert "M52.0 210.0L466.0 12.0" in chart.drawing  # the corners of the plot
    assert chart.table == Table(["x", "a"], [["0", "0"], ["10", "4"]])
    assert line_chart([Series("a", [1.0], [float("nan")])], title="T", x_label="x") is None


def test_text_in_a_chart_is_escaped():
    chart = line_chart(
        [Series("<b>&", [0, 1], [0.0, 4.0]), Series("c", [0, 1], [1.0, 2.0])],
        title="T",
        x_label="<i>",
        y_label="<u>",
        rule=(0.5, '"<s>'),
    )
    assert chart is not None
    assert isinstance(chart.drawing, Markup)
    for text in ("&lt;b&gt;&amp;: 4 at 1", "&lt;i&gt;", "&lt;u&gt;", "&#34;&lt;s&gt;"):
        assert text in chart.drawing
    for tag in ("<b", "<i", "<u", "<s>"):
        assert tag not in chart.drawing


def test_layout_keeps_groups_together_and_repeats():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 20)
    points = 10 * np.eye(3)[group] + rng.normal(size=(60, 3))
    places = lay_out(points.astype(np.float16))
    assert places.min() == 0.0
    assert places.max() == 1.0
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (group[distance.argmin(axis=1)] == group).all()
    assert np.array_equal(places, lay_out(points.astype(np.float16)))
    for count in (0, 1, 3):
        assert lay_out(np.zeros((count, 2), dtype=np.float16)).shape == (count, 2)


def test_record_is_loaded_as_it_was_saved(make_run):
    record = EmbeddingRecord.load(make_run())
    assert record.clustered
    assert record.num_clusters == 6
    assert record.epoch == 2
    assert record.eps == 0.6


# --- right sentences ----------------------------------------------------------------------


def text_of(folder):
    return run_page(collect_run(folder))


def test_cameras_have_the_names_of_the_user(make_run):
    folder = make_run(ranked=False)
    listed = json.loads((folder / "images.json").read_text())
    listed["camera_names"] = ["door", "hall", "yard & gate"]
    (folder / "images.json").write_text(json.dumps(listed))
    text = text_of(folder)
    assert "camera door (" in text
    assert "camera yard &amp; gate (" in text
    assert not re.search(r"camera \d", text)


def test_cameras_of_a_test_set_count_from_one_as_its_files_do(make_run):
    text = text_of(make_run())
    cameras = set(re.findall(r"[Pp]erson \d+, camera (\d+)", text))
    assert cameras
    assert cameras <= {"1", "2", "3"}


def test_a_run_without_clusters_explains_none(make_run):
    text = text_of(make_run(clustered=False))
    visible = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    for word in ("Clusters are pure", "DBSCAN", "within eps", "cluster -1"):
        assert word not in visible, word
    assert re.search(r"clustered\W+false", text)
    assert "Clusters are pure" in text_of(make_run("other"))


def test_a_run_with_one_camera_compares_none(make_run):
    folder = make_run()
    record = EmbeddingRecord.load(folder)
    assert "similar distributions" in text_of(folder)
    counts = record.counts.copy()
    counts[OTHER_CAMERA] = 0
    dataclasses.replace(record, counts=counts).save(folder)
    assert "similar distributions" not in text_of(folder)


def test_every_chart_has_a_legend(make_run):
    text = text_of(make_run())
    charts = re.findall(r'<figure class="chart">.*?</figure>', text, flags=re.DOTALL)
    assert len(charts) > 3
    assert all('<ul class="legend">' in chart for chart in charts)


def test_no_result_after_the_last_match_is_marked_as_wrong(make_run):
    folder = make_run()
    shown = [
        RankedImage("a.png", 1, 0.1, True),
        RankedImage("b.png", 1, 0.2, False),
        RankedImage("c.png", 1, 0.3, False),
    ]
    perfect = RankedQuery("q.png", 1, 0, 1.0, tuple(shown), 1)
    partial = RankedQuery("r.png", 1, 0, 0.7, tuple(shown), 2)
    without = RankedQuery("s.png", 1, 0, math.nan, tuple(shown[1:]), 0)
    for query, wrong, mark in (
        (perfect, 0, "100 %"),
        (partial, 2, "70 %"),
        (without, 2, "no match"),
    ):
        write_ranked(folder, "Small", [query])
        text = text_of(folder)
        assert text.count('<li class="miss">') == wrong
        assert mark in text


def test_matches_are_counted(make_run):
    (queries,) = read_ranked(make_run()).values()
    for query in queries:
        if not math.isnan(query.average_precision):
            assert query.num_matches > 0

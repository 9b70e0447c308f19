import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from selcon_plugin.report.sheets import (
    QUERY_COLOR,
    RIGHT_COLOR,
    WRONG_COLOR,
    SheetRow,
    contact_sheet,
    loss_curve,
    ranked_sheet,
)
from selcon_plugin.runs.metrics import read_metrics
from selcon_plugin.runs.ranked import LabeledImages, rank_gallery

SIZE = (16, 32)


def images(folder: Path, pids: list[int], camids: list[int], shade: int) -> LabeledImages:
    """Write one plain gray image per entry; its shade identifies it."""
    folder.mkdir()
    paths = []
    for number in range(len(pids)):
        path = folder / f"{number}.png"
        Image.new("RGB", SIZE, (shade + number,) * 3).save(path)
        paths.append(str(path))
    return LabeledImages(paths, np.array(pids), np.array(camids))


@pytest.fixture
def query(tmp_path: Path) -> LabeledImages:
    return images(tmp_path / "query", [1, 2], [1, 1], 100)


@pytest.fixture
def gallery(tmp_path: Path) -> LabeledImages:
    #                                     right  wrong  junk  right  (for query 0)
    return images(tmp_path / "gallery", [1, 2, 1, 1], [2, 2, 1, 3], 150)


def frames(sheet: Path) -> list[list[tuple[tuple[int, int, int], int]]]:
    """Read the frame color and the image shade of every cell of a sheet, row by row."""
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    colors = (QUERY_COLOR, RIGHT_COLOR, WRONG_COLOR)
    is_frame = np.zeros(pixels.shape[:2], dtype=bool)
    for color in colors:
        is_frame |= (pixels == color).all(axis=2)
    # The upper edge of a cell is a line of frame color as wide as the cell.
    width = SIZE[0] + 8
    rows = []
    for y in range(1, len(pixels)):
        cells = []
        for x in range(1, pixels.shape[1] - width):
            edge = is_frame[y, x : x + width].all() and not is_frame[y, x - 1]
            if edge and not is_frame[y - 1, x]:
                cells.append((tuple(pixels[y, x]), pixels[y + 20, x + width // 2][0]))
        if cells:
            rows.append(cells)
    return rows


def test_right_is_green_wrong_is_red_and_junk_is_left_out(tmp_path, query, gallery):
    distances = np.array([[0.3, 0.2, 0.1, 0.4], [0.3, 0.2, 0.1, 0.4]])
    sheet = ranked_sheet(
        tmp_path / "sheet.png",
        query,
        gallery,
        {"m": distances},
        queries=[0, 1],
        image_size=SIZE,
    )
    first, second = frames(sheet)
    assert first == [
        (QUERY_COLOR, 100),
        (WRONG_COLOR, 151),  # gallery 2 is nearer, but it is the same person and camera
        (RIGHT_COLOR, 150),
        (RIGHT_COLOR, 153),
    ]
    assert second == [
        (QUERY_COLOR, 101),
        (WRONG_COLOR, 152),
        (RIGHT_COLOR, 151),
        (WRONG_COLOR, 150),
        (WRONG_COLOR, 153),
    ]


def test_models_have_one_row_each(tmp_path, query, gallery):
    before = np.array([[0.3, 0.2, 0.1, 0.4]] * 2)
    after = np.array([[0.1, 0.9, 0.1, 0.2]] * 2)
    sheet = ranked_sheet(
        tmp_path / "new" / "sheet.png",
        query,
        gallery,
        {"before": before, "after": after},
        queries=[0],
        top=2,
        image_size=SIZE,
    )
    upper, lower = frames(sheet)
    assert upper == [(QUERY_COLOR, 100), (WRONG_COLOR, 151), (RIGHT_COLOR, 150)]
    assert lower == [(QUERY_COLOR, 100), (RIGHT_COLOR, 150), (RIGHT_COLOR, 153)]


def test_gallery_smaller_than_top_gives_shorter_rows(tmp_path, query):
    gallery = images(tmp_path / "small", [2, 1], [2, 1], 150)
    sheet = ranked_sheet(
        tmp_path / "sheet.png",
        query,
        gallery,
        {"m": [[0.2, 0.1], [0.2, 0.1]]},
        queries=[0],
        image_size=SIZE,
    )
    assert frames(sheet) == [[(QUERY_COLOR, 100), (WRONG_COLOR, 150)]]


def test_gallery_of_junk_shows_only_the_query(tmp_path, query):
    gallery = images(tmp_path / "junk", [1], [1], 150)
    sheet = ranked_sheet(
        tmp_path / "sheet.png",
        query,
        gallery,
        {"m": [[0.2], [0.1]]},
        queries=[0],
        image_size=SIZE,
    )
    assert frames(sheet) == [[(QUERY_COLOR, 100)]]


def test_ranking_matches_the_definition():
    rng = np.random.default_rng(0)
    gallery = LabeledImages(
        [str(n) for n in range(50)], rng.integers(0, 4, 50), rng.integers(0, 3, 50)
    )
    distance = rng.random(50).round(1)  # with ties, whose order is kept
    expected = [
        number
        for number in sorted(range(50), key=lambda n: distance[n])
        if not (gallery.pids[number] == 2 and gallery.camids[number] == 1)
    ]
    assert rank_gallery(distance, 2, 1, gallery, top=50).tolist() == expected
    assert rank_gallery(distance, 2, 1, gallery, top=7).tolist() == expected[:7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distances": {}}, "distances is empty"),
        ({"queries": []}, "queries is empty"),
        ({"queries": [2]}, "queries 0 to 1, but not 2"),
        ({"queries": [-1]}, "queries 0 to 1, but not -1"),
        ({"distances": {"m": np.zeros((4, 2))}}, r"must have shape \(2, 4\)"),
        ({"top": 0}, "top must be 1 or more"),
    ],
)
def test_wrong_arguments_are_reported(tmp_path, query, gallery, arguments, message):
    defaults = {"distances": {"m": np.zeros((2, 4))}, "queries": [0]}
    with pytest.raises(ValueError, match=message):
        ranked_sheet(tmp_path / "sheet.png", query, gallery, **(defaults | arguments))


def test_empty_gallery_and_uneven_labels_are_reported(tmp_path, query):
    nobody = LabeledImages([], np.array([]), np.array([]))
    with pytest.raises(ValueError, match="gallery is empty"):
        ranked_sheet(
            tmp_path / "s.png", query, nobody, {"m": np.zeros((2, 0))}, queries=[0]
        )
    with pytest.raises(ValueError, match="same length, got 1, 2 and 1"):
        LabeledImages(["a"], np.array([1, 2]), np.array([1]))


def write_metrics(file: Path, records: list[dict], tail: str = "") -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return file


def colored(picture: Path, strongest: int) -> int:
    """Count the pixels in which one channel is clearly the largest."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    others = np.delete(pixels, strongest, axis=2).max(axis=2)
    return int((pixels[:, :, strongest] > others + 40).sum())


def test_loss_curve_draws_loss_and_precision(tmp_path):
    records = [{"iteration": n, "total_loss": 5.0 - n / 10} for n in range(0, 40, 10)]
    metrics = write_metrics(tmp_path / "loss_only.json", records)
    plain = loss_curve(metrics, tmp_path / "new" / "plain.png")
    assert colored(plain, 2) > 100  # blue
    assert colored(plain, 1) == 0

    records += [{"iteration": n, "neighbor_precision": n / 100} for n in (19, 39)]
    metrics = write_metrics(tmp_path / "both.json", records)
    both = loss_curve(metrics, tmp_path / "both.png", steps_per_epoch=10)
    assert colored(both, 2) > 100
    assert colored(both, 1) > 100  # green


def test_warmup_is_a_separate_line(tmp_path):
    records = [{"iteration": n, "total_loss": 3.0 + n} for n in range(9, 50, 10)]
    metrics = write_metrics(tmp_path / "metrics.json", records)
    joined = loss_curve(metrics, tmp_path / "joined.png")
    apart = loss_curve(metrics, tmp_path / "apart.png", warmup_steps=20)
    assert colored(apart, 2) < colored(joined, 2)  # one piece of the line is missing


def test_half_written_and_foreign_lines_are_skipped(tmp_path):
    metrics = write_metrics(
        tmp_path / "metrics.json",
        [
            {"iteration": 9, "total_loss": 4.0},
            {"iteration": 19, "total_loss": float("nan")},
        ],
        tail='[1]\n"text"\n{"eta_seconds": 3.0}\n{"iteration": 29, "total_lo',
    )
    assert [record["iteration"] for record in read_metrics(metrics)] == [9, 19]
    assert loss_curve(metrics, tmp_path / "loss.png").is_file()


def test_the_last_record_of_an_iteration_counts(tmp_path):
    metrics = write_metrics(
        tmp_path / "metrics.json",
        [
            {"iteration": 9, "total_loss": 4.0, "lr": 0.1},
            {"iteration": 19, "total_loss": 3.0},
            {"iteration": 9, "total_loss": 5.0},
        ],
    )
    assert read_metrics(metrics) == [
        {"iteration": 9, "total_loss": 5.0, "lr": 0.1},
        {"iteration": 19, "total_loss": 3.0},
    ]


def test_missing_metrics_and_missing_loss_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no metrics at"):
        loss_curve(tmp_path / "metrics.json", tmp_path / "loss.png")
    metrics = write_metrics(tmp_path / "metrics.json", [{"iteration": 9, "lr": 0.1}])
    with pytest.raises(ValueError, match="no total_loss"):
        loss_curve(metrics, tmp_path / "loss.png")


def test_no_display_and_no_pyplot_are_needed(tmp_path):
    metrics = write_metrics(
        tmp_path / "metrics.json", [{"iteration": 9, "total_loss": 4.0}]
    )
    code = (
        "import sys; from selcon_plugin.report.sheets import loss_curve;"
        "loss_curve(sys.argv[1], sys.argv[2]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, metrics, tmp_path / "loss.png"],
        check=True,
        env={"MPLCONFIGDIR": matplotlib.get_cachedir(), "PYTHONPATH": ":".join(sys.path)},
    )


def test_contact_sheet_samples_each_group_evenly(
    gallery: LabeledImages, tmp_path: Path
) -> None:
    rows = [SheetRow("few", gallery.paths[:2]), SheetRow("many", gallery.paths)]
    sheet = contact_sheet(tmp_path / "new" / "sheet.png", rows, columns=3, image_size=SIZE)
    found = frames(sheet)
    assert [[shade for _, shade in row] for row in found] == [[150, 151], [150, 152, 153]]
    assert {color for row in found for color, _ in row} == {QUERY_COLOR}


def test_contact_sheet_refuses_empty_groups_and_single_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no groups"):
        contact_sheet(tmp_path / "sheet.png", [])
    with pytest.raises(ValueError, match="columns"):
        contact_sheet(tmp_path / "sheet.png", [SheetRow("a", ["a.png"])], columns=1)

"""SyntheticPersons: reproducible, complete or absent, and a valid test set."""

import json
import multiprocessing
import os
import re
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.datasets import (
    GALLERY_FOLDER,
    QUERY_FOLDER,
    TRAIN_FOLDER,
    SyntheticPersonsSpec,
    generate_synthetic_persons,
    read_market_folder,
)
from selcon_plugin.datasets.synthetic.sheet import SHEET_SIZE, Sheet

SPLITS = (TRAIN_FOLDER, QUERY_FOLDER, GALLERY_FOLDER)
SMALL = SyntheticPersonsSpec(
    num_train_ids=3, num_test_ids=4, images_per_id=6, num_cameras=4, num_distractors=3
)
TINY = SyntheticPersonsSpec(
    num_train_ids=1, num_test_ids=1, images_per_id=2, num_cameras=2, num_distractors=1
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_synthetic_persons(tmp_path_factory.mktemp("root"), SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def generate_together(barrier: Barrier, root: str) -> None:
    barrier.wait(timeout=60)
    generate_synthetic_persons(root, TINY)


def test_same_seed_gives_same_bytes_with_any_number_of_workers(
    small: Path, tmp_path: Path
) -> None:
    again = generate_synthetic_persons(tmp_path, SMALL, num_workers=2)
    assert again.name == small.name
    assert contents(again) == contents(small)


def test_one_more_identity_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    few = generate_synthetic_persons(tmp_path, TINY)
    more = generate_synthetic_persons(
        tmp_path,
        SyntheticPersonsSpec(
            num_train_ids=2,
            num_test_ids=1,
            images_per_id=2,
            num_cameras=2,
            num_distractors=0,
        ),
    )
    shared = [key for key in contents(few) if key.startswith(f"{TRAIN_FOLDER}/0001")]
    assert len(shared) == 2
    assert all(contents(few)[key] == contents(more)[key] for key in shared)


def test_shape_off_the_sheet_leaves_it_as_it_is() -> None:
    sheet = Sheet()
    texture = Image.new("RGB", SHEET_SIZE, (255, 0, 0))
    sheet.polygon([(-50, -50), (-40, -50), (-40, -40)], texture)
    assert sheet.picture.getbbox() is None


def test_another_seed_gives_other_persons(tmp_path: Path) -> None:
    first = generate_synthetic_persons(tmp_path, TINY)
    second = generate_synthetic_persons(
        tmp_path,
        SyntheticPersonsSpec(
            num_train_ids=1,
            num_test_ids=1,
            images_per_id=2,
            num_cameras=2,
            num_distractors=1,
            seed=1,
        ),
    )
    assert first != second
    pictures = [
        {data for name, data in contents(folder).items() if name.endswith(".jpg")}
        for folder in (first, second)
    ]
    assert not pictures[0] & pictures[1]


def test_names_and_sizes_are_those_of_market(small: Path) -> None:
    name = re.compile(r"\d{4}_c\ds\d_\d{6}_\d{2}\.jpg")
    for split in SPLITS:
        for path in (small / split).iterdir():
            assert name.fullmatch(path.name), path.name
            assert re.search(r"([-\d]+)_c(\d)", path.name)
            with Image.open(path) as picture:
                assert (picture.size, picture.mode) == ((64, 128), "RGB")


def test_images_are_not_uniform(small: Path) -> None:
    for path, _, _ in read_market_folder(small / TRAIN_FOLDER):
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 15.0


def test_counts_follow_the_specification(small: Path) -> None:
    counts = {split: len(read_market_folder(small / split)) for split in SPLITS}
    assert counts[TRAIN_FOLDER] == SMALL.num_train_images == 18
    assert counts[QUERY_FOLDER] + counts[GALLERY_FOLDER] == SMALL.num_test_images == 27
    gallery = read_market_folder(small / GALLERY_FOLDER)
    assert sum(pid == 0 for _, pid, _ in gallery) == SMALL.num_distractors


def test_defaults_are_about_a_thousand_images_each() -> None:
    spec = SyntheticPersonsSpec()
    assert 900 <= spec.num_train_images <= 1100
    assert 900 <= spec.num_test_images <= 1100
    assert spec.num_cameras == 6


def test_train_and_test_identities_are_disjoint(small: Path) -> None:
    train, query, gallery = (
        {pid for _, pid, _ in read_market_folder(small / split)} for split in SPLITS
    )
    assert len(train) == SMALL.num_train_ids
    assert len(query) == SMALL.num_test_ids
    assert gallery == query | {0}
    assert not train & gallery


@pytest.mark.parametrize("images_per_id", [2, 3, 7])
@pytest.mark.parametrize("num_cameras", [2, 5])
def test_every_query_has_a_match_from_another_camera(
    tmp_path: Path, images_per_id: int, num_cameras: int
) -> None:
    spec = SyntheticPersonsSpec(
        num_train_ids=1,
        num_test_ids=3,
        images_per_id=images_per_id,
        num_cameras=num_cameras,
        num_distractors=0,
    )
    folder = generate_synthetic_persons(tmp_path, spec)
    gallery = read_market_folder(folder / GALLERY_FOLDER)
    queries = read_market_folder(folder / QUERY_FOLDER)
    assert {pid for _, pid, _ in queries} == {2, 3, 4}
    for _, pid, camid in queries:
        assert any(p == pid and c != camid for _, p, c in gallery)


def test_complete_folder_is_reused(tmp_path: Path) -> None:
    folder = generate_synthetic_persons(tmp_path, TINY)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert generate_synthetic_persons(str(tmp_path), TINY, progress=True) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_each_field_of_the_specification_changes_the_folder() -> None:
    names = {SyntheticPersonsSpec().folder_name}
    for field in ("num_train_ids", "num_test_ids", "images_per_id", "num_cameras"):
        names.add(SyntheticPersonsSpec(**{field: 5}).folder_name)
    names.add(SyntheticPersonsSpec(num_distractors=5).folder_name)
    names.add(SyntheticPersonsSpec(seed=5).folder_name)
    assert len(names) == 7


def test_concurrent_processes_get_one_complete_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=generate_together, args=(barrier, str(tmp_path)))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [TINY.folder_name]
    single = generate_synthetic_persons(tmp_path / "single", TINY)
    assert contents(tmp_path / TINY.folder_name) == contents(single)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_die_half_way, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not (tmp_path / TINY.folder_name).exists()
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    folder = generate_synthetic_persons(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def _die_half_way(root: str) -> None:
    from selcon_plugin.datasets.synthetic import persons as synthetic_persons

    original = synthetic_persons._render_group
    calls = []

    def draw_one_then_die(*args: object) -> None:
        if calls:
            os._exit(9)
        calls.append(args)
        original(*args)  # type: ignore[arg-type]

    synthetic_persons._render_group = draw_one_then_die
    generate_synthetic_persons(root, TINY)


def test_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("selcon_plugin.datasets.synthetic.persons._render_group", fail)
    with pytest.raises(OSError, match="disk full"):
        generate_synthetic_persons(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault", ["no manifest", "cut short", "other spec", "lost picture"]
)
def test_broken_folder_is_written_again(tmp_path: Path, fault: str) -> None:
    folder = generate_synthetic_persons(tmp_path, TINY)
    good = contents(folder)
    manifest = folder / "manifest.json"
    if fault == "no manifest":
        manifest.unlink()
    elif fault == "cut short":
        manifest.write_text(manifest.read_text()[:20])
    elif fault == "other spec":
        changed = json.loads(manifest.read_text())
        changed["spec"]["seed"] = 77
        manifest.write_text(json.dumps(changed))
    else:
        next((folder / TRAIN_FOLDER).iterdir()).unlink()
    assert generate_synthetic_persons(tmp_path, TINY) == folder
    assert contents(folder) == good
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_ids", 0),
        ("num_test_ids", -3),
        ("images_per_id", 1),
        ("num_cameras", 1),
        ("num_cameras", 10),
        ("num_distractors", -1),
        ("seed", -1),
        ("images_per_id", 2.5),
    ],
)
def test_illegal_values_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} .*\[.*\], got {value}"):
        SyntheticPersonsSpec(**{field: value})  # type: ignore[arg-type]


def test_too_many_identities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_train_ids \+ num_test_ids .* 9999"):
        SyntheticPersonsSpec(num_train_ids=9000, num_test_ids=1000)


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_workers .* got 0"):
        generate_synthetic_persons(tmp_path, TINY, num_workers=0)


def test_reading_is_sorted_and_counts_cameras_from_0(tmp_path: Path) -> None:
    for name in ("0007_c3s1_000002_00.jpg", "-1_c1s1_000001_00.jpg", "0000_c6s2_9_1.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "Thumbs.db").touch()
    rows = read_market_folder(tmp_path)
    assert [(Path(path).name[:4], pid, camid) for path, pid, camid in rows] == [
        ("-1_c", -1, 0),
        ("0000", 0, 5),
        ("0007", 7, 2),
    ]


@pytest.mark.parametrize("name", ["holiday.jpg", "0001_c0s1_000001_00.jpg", "c1_0001.png"])
def test_reading_refuses_other_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=re.escape(name)):
        read_market_folder(tmp_path)


def test_reading_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_market_folder(tmp_path / "nowhere")

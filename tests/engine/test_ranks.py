"""Processes of a run that differ are stopped; this file is the program of two of them."""

import sys
from pathlib import Path

import pytest
import torch

from helpers.ddp import join_group, run_ranks, saved_by_ranks
from selcon_plugin.distributed import rank
from selcon_plugin.engine import ranks
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.ranks import check_same_on_all_ranks

SETTINGS = {"SOLVER.BASE_LR": 0.1, "MODEL.SELCON.SEED": 0, "OUTPUT_DIR": "a"}


# By case, what the second process has: settings, contents of the images, folder.
CASES = {
    "equal": ({}, (0, 1, 2, 3), ""),
    "link to the folder": ({}, (0, 1, 2, 3), "link"),
    "settings": ({"SOLVER.BASE_LR": 0.2}, (0, 1, 2, 3), ""),
    "exchanged": ({}, (0, 2, 1, 3), ""),
    "fewer": ({}, (0, 1, 2), ""),
    "folder": ({}, (0, 1, 2, 3), "elsewhere"),
}
REFUSED = {
    "settings": "SOLVER.BASE_LR is 0.1 in process 0 and 0.2",
    "exchanged": "2 images have another content: 1.jpg, 2.jpg",
    "fewer": "it has 3 training images, process 0 has 4; they differ in 3.jpg",
    "folder": "OUTPUT_DIR is",
}


def written_images(folder, contents):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.jpg" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(bytes([content] * 10))
    return IndexedImages([(str(path), 0, 0) for path in paths], open, None)


def refused(case, folder):
    """Return the error of this process; "" if it may train."""
    changed, contents, output = CASES[case]
    settings, place = SETTINGS, folder / "out"
    if rank() == 1:
        settings, place = {**SETTINGS, **changed}, folder / (output or "out")
    images = written_images(
        folder / f"{case} {rank()}", contents if rank() else (0, 1, 2, 3)
    )
    try:
        check_same_on_all_ranks(settings, images, OUTPUT_DIR=str(place))
    except ValueError as error:
        return str(error)
    return ""


def test_two_real_processes_that_differ_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("out")
    run_ranks(__file__, tmp_path)
    first, second = saved_by_ranks(tmp_path)
    assert first == second
    for case, message in first.items():
        if case in REFUSED:
            assert message.startswith("process 1 differs from process 0: "), case
            assert REFUSED[case] in message
            assert "Start all processes with the same" in message
        else:
            assert not message, case
    for place in ("out", "elsewhere"):
        assert str(tmp_path / place) in first["folder"]


@pytest.fixture
def images(tmp_path):
    return written_images(tmp_path, range(4))


@pytest.fixture
def check(images, monkeypatch):
    """Check two processes, the second of which has other properties."""

    def run(**other):
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        monkeypatch.setattr(
            ranks,
            "gather_values",
            lambda properties: [properties, {**properties, **other}],
        )
        check_same_on_all_ranks(SETTINGS, images)

    return run


@pytest.mark.parametrize(
    ("key", "value"),
    [("SOLVER.BASE_LR", 0.2), ("MODEL.SELCON.SEED", 1)],
)
def test_other_settings_are_named_with_both_values(check, key, value):
    with pytest.raises(ValueError, match="process 1 differs from process 0") as refused:
        check(settings={**SETTINGS, key: value})
    assert f"{key} is {SETTINGS[key]!r} in process 0 and {value!r}" in str(refused.value)


def test_exchanged_images_are_named(check, images):
    with pytest.raises(ValueError, match=r"2 images have another content: 1\.jpg, 2\.jpg"):
        check(content=[images.hashes[i] for i in (0, 2, 1, 3)])


def test_other_lists_of_images_are_named(check):
    with pytest.raises(ValueError, match=r"has 3 training images, .* has 4.* 3\.jpg"):
        check(images=["0.jpg", "1.jpg", "2.jpg"])


def test_other_code_is_named(check):
    with pytest.raises(ValueError, match=r"its version is '0\.1 old'"):
        check(code="0.1 old")


def test_equal_processes_and_free_settings_pass(check, images, monkeypatch):
    check()
    check(settings={**SETTINGS, "OUTPUT_DIR": "b"})
    monkeypatch.setattr(ranks, "world_size", lambda: 1)
    check_same_on_all_ranks(SETTINGS, images)


if __name__ == "__main__":
    this_rank, shared = int(sys.argv[1]), Path(sys.argv[2])
    join_group(this_rank, shared)
    torch.save({case: refused(case, shared) for case in CASES}, shared / f"{this_rank}.pt")

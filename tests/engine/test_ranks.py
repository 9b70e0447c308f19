"""Processes of a run that differ are stopped, with the names of what differs."""

import pytest

from selcon_plugin.engine import ranks
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.ranks import check_same_on_all_ranks

SETTINGS = {"SOLVER.BASE_LR": 0.1, "MODEL.SELCON.SEED": 0, "OUTPUT_DIR": "a"}


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i] * 10))
    return IndexedImages([(str(path), 0, 0) for path in paths], open, None)


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

"""The hash of an image follows its content, whatever its name, size and time."""

import os

import pytest

from selcon_plugin.datasets import content
from selcon_plugin.datasets.content import MISSING, content_hash, content_hashes, list_hash


def test_same_name_size_and_time_but_another_content(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(b"one picture")
    os.utime(file, (1, 1))
    before = content_hash(file)
    file.write_bytes(b"two picture")
    os.utime(file, (1, 1))
    assert content_hash(file) != before
    file.write_bytes(b"one picture")
    assert content_hash(file) == before
    assert len(before) == 16


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_every_byte_of_a_small_file_counts(tmp_path, size):
    file = tmp_path / "a.jpg"
    file.write_bytes(bytes(size))
    before = content_hash(file)
    for position in range(0, size, 997):
        changed = bytearray(size)
        changed[position] = 1
        file.write_bytes(changed)
        assert content_hash(file) != before
    file.write_bytes(bytes(size + 1))
    assert content_hash(file) != before


def test_of_a_large_file_three_parts_and_the_size_count(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_WHOLE", 100)
    monkeypatch.setattr(content, "_PART", 10)
    file = tmp_path / "a.jpg"
    file.write_bytes(bytes(1000))
    hashes = {content_hash(file)}
    for position in (0, 9, 495, 504, 990, 999):
        changed = bytearray(1000)
        changed[position] = 1
        file.write_bytes(changed)
        hashes.add(content_hash(file))
    file.write_bytes(bytes(1001))
    hashes.add(content_hash(file))
    assert len(hashes) == 8


def test_many_files_keep_their_order_and_absent_ones_have_no_hash(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(20)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    paths[7].unlink()
    paths[8].unlink()
    os.mkfifo(paths[8])
    hashes = content_hashes(paths)
    assert hashes == [content_hash(path) for path in paths]
    assert hashes[7] == hashes[8] == content_hash("a\0b") == MISSING
    assert len(set(hashes)) == 19


def test_hash_of_a_list_follows_order_and_borders():
    values = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [], ["\udcff"]]
    assert len({list_hash(value) for value in values}) == len(values)

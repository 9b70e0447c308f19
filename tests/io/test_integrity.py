"""A damaged file is noticed; one of an earlier version, without checksums, still loads."""

import contextlib
import io
import json
import random
import zipfile

import numpy as np
import pytest
import torch

from selcon_plugin.io.integrity import (
    DamagedFileError,
    file_checksum,
    sealed_json,
    unsealed_json,
    verify_file,
    verify_zip,
)


def flipped(content, position, bit):
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def written(kind, file):
    arrays = {f"layer{i}.weight": np.arange(i, i + 40, dtype=np.float32) for i in range(5)}
    if kind == "torch":
        torch.save({name: torch.from_numpy(a) for name, a in arrays.items()}, file)
    elif kind == "npz":
        np.savez(file, **arrays)
    else:
        np.savez_compressed(file, **arrays)


def read(kind, content):
    if kind == "torch":
        return torch.load(io.BytesIO(content), weights_only=True)
    with np.load(io.BytesIO(content)) as arrays:
        return {name: arrays[name] for name in arrays.files}


def as_bytes(arrays):
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("kind", ["torch", "npz", "compressed"])
def test_any_flipped_bit_is_noticed_or_without_effect(tmp_path, kind):
    file = tmp_path / "a.npz"
    written(kind, file)
    content = file.read_bytes()
    verify_zip(file)
    expected = as_bytes(read(kind, content))
    with zipfile.ZipFile(file) as archive:
        start_of_list = archive.start_dir
    chosen = random.Random(5)
    flips = [(chosen.randrange(start_of_list), chosen.randrange(8)) for _ in range(600)]
    # The list of the records has no checksum of its own.
    flips += [(i, bit) for i in range(start_of_list, len(content)) for bit in range(8)]
    noticed = 0
    for position, bit in flips:
        damaged = flipped(content, position, bit)
        try:
            verify_zip(io.BytesIO(damaged))
        except DamagedFileError:
            noticed += 1
            continue
        try:
            result = as_bytes(read(kind, damaged))
        except Exception:
            continue
        assert result == expected, f"bit {bit} of byte {position}"
    assert noticed > 1000


def test_error_names_file_and_remedy(tmp_path):
    file = tmp_path / "bank.pth"
    written("torch", file)
    content = file.read_bytes()
    file.write_bytes(flipped(content, content.index(np.float32(7).tobytes()), 0))
    with pytest.raises(DamagedFileError, match=r"bank.pth is damaged.*train again"):
        verify_zip(file, remedy="train again")


def test_other_kinds_of_files_are_left_to_their_reader(tmp_path):
    for name, content in {
        "empty": b"",
        "text": b"PK is no zip",
        "old": b"\x80\x02}.",
    }.items():
        (tmp_path / name).write_bytes(content)
        verify_zip(tmp_path / name)
    with pytest.raises(DamagedFileError, match="list of records"):
        verify_zip(io.BytesIO(b"PK\x03\x04 is a zip"))


@pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"),
    reason="torch before 2.6 writes checksums always",
)
def test_a_file_without_checksums_is_accepted(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        written("torch", tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    verify_zip(tmp_path / "a.pth")


def test_position_of_a_stream_is_kept(tmp_path):
    written("torch", tmp_path / "a.pth")
    with open(tmp_path / "a.pth", "rb") as stream:
        verify_zip(stream)
        assert stream.tell() == 0


def test_stored_checksum_of_any_file(tmp_path):
    file = tmp_path / "rows.npy"
    file.write_bytes(bytes(range(256)) * 9)
    checksum = file_checksum(file)
    verify_file(file, checksum)
    verify_file(file, None)
    file.write_bytes(flipped(file.read_bytes(), 1000, 3))
    with pytest.raises(
        DamagedFileError, match=r"rows.npy is damaged.*add the images again"
    ):
        verify_file(file, checksum, remedy="add the images again")


def test_any_flipped_bit_in_json_is_noticed():
    content = {"epoch": 3, "best": 0.25, "names": ["a", "é"], "none": None}
    text = sealed_json(content).encode()
    assert unsealed_json(text, "state.json") == content
    with pytest.raises(DamagedFileError, match=r"state.json is damaged.*start over"):
        unsealed_json(text.replace(b"3", b"4", 1), "state.json", remedy="start over")
    for position in range(len(text) - 1):  # the last one is the newline
        for bit in range(8):
            damaged = flipped(text, position, bit)
            with contextlib.suppress(DamagedFileError):
                assert unsealed_json(damaged, "state.json") == content


def test_json_of_earlier_versions_has_no_checksum():
    assert unsealed_json(json.dumps({"epoch": 3}), "state.json") == {"epoch": 3}
    with pytest.raises(DamagedFileError, match="list"):
        unsealed_json("[]", "state.json")

"""A file whose reading does not end is named, and a loader gives up its reader."""

import threading
import time

import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from selcon_plugin.datasets import reading, slow_reads
from selcon_plugin.datasets.slow_reads import (
    HungReaderError,
    hung_readers_named,
    loader_timeout,
)


def test_a_file_that_is_read_for_long_is_named_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(slow_reads, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(slow_reads, "watch", slow_reads._Watch())
    monkeypatch.setattr(reading, "watch", slow_reads.watch)
    file = tmp_path / "slow\x1b[2J.png"
    Image.new("RGB", (4, 8)).save(file)
    original, done = reading._load, threading.Event()

    def load(image):
        done.wait(5)
        original(image)

    monkeypatch.setattr(reading, "_load", load)
    reader = threading.Thread(target=reading.read_rgb, args=(file,))
    reader.start()
    for _ in range(100):
        if caplog.messages:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    done.set()
    reader.join()
    assert len(caplog.messages) == 1
    assert r"slow\x1b[2J.png: not read after" in caplog.messages[0]
    assert not slow_reads.watch._open


class HungImages(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(30 * (index == 2))
        return index


def test_a_hung_reading_process_ends_the_loader(monkeypatch):
    monkeypatch.setenv("SELCON_READ_TIMEOUT", "1")
    loader = DataLoader(HungImages(), 1, num_workers=1, timeout=loader_timeout(1))
    with (
        pytest.raises(HungReaderError, match=r"1 s: a warning above"),
        hung_readers_named(),
    ):
        list(loader)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^other$"), hung_readers_named():
        raise RuntimeError("other")


def test_timeout_is_a_number_of_seconds(monkeypatch):
    monkeypatch.delenv("SELCON_READ_TIMEOUT", raising=False)
    assert (loader_timeout(0), loader_timeout(2)) == (0.0, 600.0)
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("SELCON_READ_TIMEOUT", text)
        assert loader_timeout(0) == 0.0
        with pytest.raises(ValueError, match="SELCON_READ_TIMEOUT"):
            loader_timeout(1)

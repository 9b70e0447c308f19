import subprocess
import sys
from types import SimpleNamespace

import pytest

from selcon_plugin.engine import estimates
from selcon_plugin.engine.estimates import (
    Estimate,
    check_memory,
    clustering_estimate,
    extraction_estimate,
    product_rate,
)

# What the docs promise.
FACTOR = 4

MEASURE = """
import time, torch
torch.set_num_threads(1)
from selcon_plugin.clustering import build_labeler
from selcon_plugin.runs.results import peak_memory_mib
from selcon_plugin.engine.estimates import clustering_estimate, product_rate
rng = torch.Generator().manual_seed(0)
centers = torch.randn(600, 128, generator=rng).repeat_interleave(10, dim=0)
features = centers + 1.2 * torch.randn(6000, 128, generator=rng)
labeler = build_labeler("DBSCAN", eps="auto")
labeler(features[:100])  # what is compiled once
expected = clustering_estimate(6000, 128, k1=30, products_per_second=product_rate(128))
before, started = peak_memory_mib(), time.perf_counter()
labeler(features)
print(time.perf_counter() - started, peak_memory_mib() - before)
print(expected.seconds, expected.memory / 2**20)
"""


def test_clustering_takes_what_was_expected_within_the_stated_factor() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    seconds, memory, expected_seconds, expected_memory = map(float, done.stdout.split())
    # Seconds and some hundred MiB are expected of any number of images.
    assert seconds < FACTOR * expected_seconds
    assert expected_seconds < FACTOR * seconds + 3
    assert memory < expected_memory < FACTOR * memory + 200


def test_features_take_what_the_first_images_take(monkeypatch) -> None:
    calls: list[int] = []
    # A clock that moves by 2 ms for each image, and by a second for the first call.
    clock = {"perf_counter": lambda: 0.002 * sum(calls) + bool(calls)}
    monkeypatch.setattr(estimates, "time", SimpleNamespace(**clock))

    def embed(count: int) -> None:
        calls.append(count)

    expected = extraction_estimate(embed, 1000, dim=8, batch_size=20)
    assert expected.seconds == pytest.approx(2.0)
    assert expected.memory == 1000 * 8 * 4 * 2
    assert calls == [2, 20]


def test_clustering_formula_by_hand() -> None:
    expected = clustering_estimate(1000, 100, k1=30, products_per_second=1e7)
    assert expected.seconds == pytest.approx(0.4 * 10 + 0.3 + 3)
    assert expected.memory == 1000 * (600 + 360 + 4000) + 200 * 2**20


def test_product_rate_is_that_of_a_computer() -> None:
    assert 1e8 < product_rate(64) < 1e15


def test_one_after_the_other_adds_time_but_not_memory() -> None:
    assert Estimate(10, 5) + Estimate(20, 3) == Estimate(30, 5)


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(0.2, 3 * 2**20), "about 1 s and 3 MiB of memory"),
        (Estimate(59.9, 2**30), "about 60 s and 1.0 GiB of memory"),
        (Estimate(600, 3 * 2**29), "about 10 min and 1.5 GiB of memory"),
        (Estimate(9000, 0), "about 2.5 h and 0 MiB of memory"),
    ],
)
def test_as_text(estimate: Estimate, words: str) -> None:
    assert str(estimate) == words


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "available_memory", lambda: 1000 * 2**20)
    check_memory(Estimate(1, 900 * 2**20), "clustering")
    with pytest.raises(ValueError, match=r"clustering needs about 901 MiB.*only 1000 MiB"):
        check_memory(Estimate(1, 901 * 2**20), "clustering")
    monkeypatch.setattr(estimates, "available_memory", lambda: None)
    check_memory(Estimate(1, 2**60), "clustering")


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch) -> None:
    files = {
        "_MEMORY_INFO": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "_GROUP_LIMIT": "5000000\n",
        "_GROUP_USE": "1000000\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(estimates, name, tmp_path / name)
    assert estimates.available_memory() == 4_000_000
    (tmp_path / "_GROUP_LIMIT").write_text("max\n")
    assert estimates.available_memory() == 8000 * 1024

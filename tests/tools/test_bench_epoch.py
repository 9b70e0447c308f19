"""Phases of an epoch, with a clock controlled by the test."""

from typing import ClassVar

import pytest
import torch

from bench_epoch import Phases, TimedBatches, report, time_reading


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def tick(seconds):
        now[0] += seconds

    return tick


def test_seconds_count_once_for_the_innermost_phase(clock):
    phases = Phases(torch.device("cpu"))
    loss = phases.timed("loss", lambda: clock(2))

    def forward():
        clock(1)
        loss()
        clock(4)
        return "losses"

    forward = phases.timed("forward", forward)
    clock(100)  # before the start
    phases.start()
    clock(8)
    assert forward() == "losses"
    clock(16)
    phases.stop()
    assert phases.seconds == {"forward": 5, "loss": 2, "other": 24}


def test_phase_ends_where_its_function_fails(clock):
    phases = Phases(torch.device("cpu"))
    phases.start()

    def fail():
        clock(1)
        raise KeyError

    with pytest.raises(KeyError):
        phases.timed("data", fail)()
    clock(2)
    phases.stop()
    assert phases.seconds == {"data": 1, "other": 2}


def test_waits_for_batches_are_data(clock):
    phases = Phases(torch.device("cpu"))
    phases.start()
    batches = TimedBatches((clock(n) for n in (1, 2)), phases)
    assert len(list(batches)) == 2
    batches.close()
    assert phases.seconds["data"] == 3


def test_report_shows_ratios_of_all_phases():
    rates = ("network", "steps", "epoch", "one_reader")
    speeds = {f"{name}_images_per_second": 10.0 for name in rates}
    measured = {
        "phases": {"data": 1.0, "loss": 3.0},
        "steps_ratio_to_network": 0.5,
        **speeds,
    }
    text = report(measured)
    assert text.index("| loss | 3.00 | 75.0% |") < text.index("| data | 1.00 | 25.0% |")
    assert "| one reader | 10.0 |" in text
    assert "relative to the network: 50.0%" in text


def test_reading_takes_other_images_each_turn():
    class Images:
        asked: ClassVar = []

        def __len__(self):
            return 5

        def __getitem__(self, key):
            self.asked.append((key.index, key.position))
            return {"images": torch.zeros(3, 4, 2), "targets": key.index}

    assert time_reading(Images(), 4, list, turns=1) > 0
    assert Images.asked == [(i % 5, i) for i in range(8)]

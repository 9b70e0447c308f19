"""Lines and bars that show how far a run is."""

import logging
import re
import sys

import pytest

from selcon_plugin.engine import progress
from selcon_plugin.engine.progress import (
    ProgressLoader,
    Stage,
    TrainingProgress,
    duration,
    with_progress,
)


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "memory", lambda: "1.5 GiB")
    return clock


@pytest.fixture
def lines():
    """Log records in their order."""
    said = []
    log = logging.getLogger("selcon_plugin")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)  # taken off again by the fixture that restores loggers
    log.setLevel(logging.INFO)
    return said


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (8.44, "8.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3600, "1 h 0 min"),
        (12_000, "3 h 20 min"),
    ],
)
def test_duration_as_text(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59.9, "60 s"), (600, "10 min"), (9000, "2.5 h")],
)
def test_approximate_duration_has_one_unit(seconds, text):
    assert duration(seconds, approximate=True) == text


def test_memory_of_this_process_is_shown():
    gib = float(re.match(r"(\d+\.\d) GiB", progress.memory())[1])
    assert 0.1 <= gib < 64


def test_one_line_at_the_end_where_there_is_no_terminal(clock, lines, capsys):
    with Stage("Reading", 3) as stage:
        for _ in range(3):
            clock.now += 5
            stage.update("loss 2.0")
    assert lines == ["Reading: 3 batches in 15 s, loss 2.0, 1.5 GiB"]
    assert capsys.readouterr() == ("", "")


def test_a_line_each_minute_tells_the_time_left(clock, lines):
    with Stage("Training", 10, unit="step", done=2) as stage:
        for _ in range(8):
            clock.now += 25
            stage.update()
    assert lines == [
        "Training: 5 of 10 steps, 2 min 5 s left, 1.5 GiB",
        "Training: 8 of 10 steps, 50 s left, 1.5 GiB",
        "Training: 8 steps in 3 min 20 s, 1.5 GiB",
    ]


def test_stage_that_cannot_be_counted_tells_its_time(clock, lines):
    with Stage("Clustering 40 images"):
        clock.now += 2.5
    assert lines == ["Clustering 40 images: 2.5 s, 1.5 GiB"]


def test_stage_that_an_error_ends_says_nothing(clock, lines):
    with pytest.raises(OSError, match="gone"), Stage("Reading", 3):
        raise OSError("gone")
    assert lines == []


def test_other_ranks_are_silent(clock, lines, monkeypatch, capsys):
    monkeypatch.setattr(progress, "rank", lambda: 1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(with_progress([1, 2], "Reading")) == [1, 2]
    assert lines == []
    assert capsys.readouterr() == ("", "")


def test_bars_need_a_terminal_on_both_outputs(monkeypatch):
    for out, err in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda out=out: out, raising=False)
        monkeypatch.setattr(sys.stderr, "isatty", lambda err=err: err, raising=False)
        assert progress.on_terminal() == (out and err)


def test_bar_on_a_terminal_shows_count_note_and_memory(clock, lines, terminal, capsys):
    with Stage("Training, epoch 1 of 2", 4, unit="step") as stage:
        for _ in range(4):
            clock.now += 1
            stage.update("loss 2.0")
        stage._bar.refresh()
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"Training, epoch 1 of 2: 100%.* 4/4 .*loss 2\.0, 1\.5 GiB", err)
    assert lines == ["Training, epoch 1 of 2: 4 steps in 4.0 s, loss 2.0, 1.5 GiB"]


def test_log_lines_stand_above_the_bar_and_handlers_come_back(terminal, capsys):
    log = logging.getLogger("selcon_plugin")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("<%(message)s>"))
    other = logging.NullHandler()
    log.addHandler(handler)
    log.addHandler(other)
    before = list(log.handlers)
    with Stage("Reading", 3) as stage:
        assert other in log.handlers
        assert handler not in log.handlers
        stage._bar.refresh()
        capsys.readouterr()
        log.info("too low")
        log.warning("look")
    assert log.handlers == before
    err = capsys.readouterr().err
    assert "too low" not in err
    # The bar is wiped before the line and drawn again after it.
    assert re.search(r"\r +\r<look>\n.*Reading: ", err)


def test_line_of_several_loggers_appears_once_above_the_bar(terminal, capsys):
    root, log = logging.getLogger(), logging.getLogger("selcon_plugin")
    handler = logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    assert log.propagate
    try:
        with Stage("Reading", 3):
            log.warning("look")
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().err.count("look") == 1


def test_watched_loader_is_the_loader(clock, lines):
    class Loader(list):
        dataset = "persons"

    watched = ProgressLoader(Loader([4, 5]), "Evaluation")
    assert watched.dataset == "persons"
    assert len(watched) == 2
    assert [*watched, *watched] == [4, 5, 4, 5]
    assert [line.partition(":")[0] for line in lines] == ["Evaluation"] * 2


def test_training_shows_each_epoch_and_the_time_of_the_whole_run(clock, lines):
    watch = TrainingProgress(epochs=3, steps_per_epoch=2, first_step=1)
    for step in range(1, 6):
        if step % 2 == 0:
            clock.now += 10  # clustering
        watch.begin_step(step)
        clock.now += 1
        watch.end_step(step, loss=3.0 - step / 2)
    # Resumed inside the first epoch: 1 step; then 1, 13 and 25 s for 1, 3 and 5 steps.
    assert lines == [
        "Training, epoch 1 of 3: 1 step in 1.0 s, loss 2.500, 4.0 s to the end of the "
        "run, 1.5 GiB",
        "Training, epoch 2 of 3: 2 steps in 2.0 s, loss 1.500, 8.7 s to the end of the "
        "run, 1.5 GiB",
        "Training, epoch 3 of 3: 2 steps in 2.0 s, loss 0.500, 1.5 GiB",
    ]


def test_epoch_that_is_stopped_closes_its_line(clock, lines, terminal):
    watch = TrainingProgress(epochs=1, steps_per_epoch=5)
    watch.begin_step(0)
    watch.end_step(0)
    bar = watch._stage._bar
    watch.close()
    watch.close()
    assert bar.disable
    assert lines == []

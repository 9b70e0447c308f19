"""Best weights by a label-free criterion, also in a resumed run."""

import math

import pytest

from selcon_plugin.engine.best_weights import BestWeights
from selcon_plugin.io.atomic import save_atomically


@pytest.mark.parametrize(
    ("criterion", "sign"),
    [("silhouette", 1), ("stability", 1), ("outlier_ratio", -1), ("cosine_silhouette", 1)],
)
def test_weights_are_saved_when_the_criterion_improves(criterion, sign):
    saved = []
    best = BestWeights(criterion, lambda epochs, _: saved.append(epochs))
    values = [0.2, 0.1, 0.2, math.nan, None, 0.3, -1.0, 0.4]
    for epochs, value in enumerate(values, start=1):
        measured = {} if value is None else {criterion: sign * value}
        best.offer({"num_clusters": 9.0} | measured, epochs)
    assert saved == [1, 6, 8]
    assert best.value == sign * 0.4


def test_resumed_run_knows_its_best():
    saved = []
    first = BestWeights("outlier_ratio", lambda epochs, _: saved.append(epochs))
    second = BestWeights("outlier_ratio", lambda epochs, _: saved.append(epochs))
    second.load_state_dict(first.state_dict())  # of a run that has none yet
    first.offer({"outlier_ratio": 0.5}, 1)
    second.load_state_dict(first.state_dict())
    second.offer({"outlier_ratio": 0.6}, 2)
    assert saved == [1]
    other = BestWeights("stability", lambda epochs, _: saved.append(epochs))
    other.load_state_dict(first.state_dict())  # of another figure: not comparable
    other.offer({"stability": 0.1}, 3)
    assert saved == [1, 3]


def test_file_of_the_best_weights_knows_a_better_value_than_the_checkpoint(tmp_path):
    file = tmp_path / "best_without_labels.pth"
    best = BestWeights("silhouette", lambda *_: None)
    best.restore_from(file)  # there is none
    for value, expected in ((0.5, 0.5), (0.3, 0.5), (0.7, 0.7)):
        state = {"figure": "silhouette", "value": value}  # allow-phrase (a key)
        save_atomically({"model": {}, "best": state}, file)
        best.restore_from(file)
        assert best.value == expected
    file.write_bytes(file.read_bytes()[:100])
    best.restore_from(file)
    assert best.value == 0.7


def test_untrained_network_takes_part_where_it_is_comparable(caplog):
    saved = []
    for criterion, expected in (("cosine_silhouette", [0]), ("stability", [1])):
        best = BestWeights(criterion, lambda epochs, _: saved.append(epochs))
        best.offer({criterion: 0.5}, 0)
        best.offer({criterion: 0.4}, 1)
        assert saved == expected
        saved.clear()


@pytest.mark.parametrize(
    ("values", "level", "said"),
    [
        ([0.2, 0.3, 0.25], "INFO", ["0.200 before", "0.300 after 1 epochs"]),
        ([0.2, 0.1, 0.15], "WARNING", ["0.200 before", "has not made the clusters"]),
    ],
)
def test_verdict_compares_with_the_untrained_network(values, level, said, caplog):
    caplog.set_level("INFO")
    first = BestWeights("cosine_silhouette", lambda *_: None)
    first.offer({"cosine_silhouette": values[0]}, 0)
    best = BestWeights("cosine_silhouette", lambda *_: None)
    best.load_state_dict(first.state_dict())  # a resumed run
    for epochs, value in enumerate(values[1:], start=1):
        best.offer({"cosine_silhouette": value}, epochs)
    caplog.clear()
    best.log_verdict()
    (record,) = caplog.records
    assert record.levelname == level
    assert all(text in record.getMessage() for text in said)


def test_no_verdict_without_the_untrained_network(caplog):
    caplog.set_level("INFO")
    best = BestWeights("silhouette", lambda *_: None)
    best.offer({"silhouette": 0.5}, 0)
    best.offer({"silhouette": 0.4}, 1)
    caplog.clear()
    best.log_verdict()
    assert not caplog.records

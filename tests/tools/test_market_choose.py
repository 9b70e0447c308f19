"""One change at a time, on known scores."""

import pytest

from market_study.choose import climb, one_at_a_time
from market_study.protocols import variant_name


def groups_of(worth):
    return {group: {level: {} for level in levels} for group, levels in worth.items()}


class Measure:
    """Sum the gains of the changes, with extra gains of some combinations."""

    def __init__(self, worth, extra=()):
        self.worth, self.extra, self.tried = worth, dict(extra), []

    def __call__(self, tried):
        names = [variant_name(changes) for changes in tried]
        self.tried += names
        return [
            self.extra.get(name, sum(self.worth[g][level] for g, level in changes.items()))
            for name, changes in zip(names, tried, strict=True)
        ]


def test_gains_are_joined():
    measure = Measure({"a": {"1": 2, "2": 3}, "b": {"1": 1}, "c": {"1": -4}})
    best = climb(measure, groups_of(measure.worth), rounds=1, margin=0.5)
    assert best == {"a": "2", "b": "1"}
    assert measure.tried == ["base", "a-1", "a-2", "b-1", "c-1", "a-2+b-1"]


def test_single_change_wins_over_a_bad_combination():
    measure = Measure({"a": {"1": 2}, "b": {"1": 1}}, {"a-1+b-1": 1.5})
    assert climb(measure, groups_of(measure.worth), rounds=1, margin=0.5) == {"a": "1"}


def test_gain_within_the_margin_is_noise():
    measure = Measure({"a": {"1": 0.5}, "b": {"1": 0.6}})
    assert climb(measure, groups_of(measure.worth), rounds=3, margin=0.5) == {"b": "1"}


def test_second_round_takes_back_what_no_longer_pays():
    extra = {"a-1+b-1": 5, "b-1": 7}  # the gain of b on its own was not known at first
    measure = Measure({"a": {"1": 2}, "b": {"1": 1}}, extra)
    first = iter([[0], [2, 1], [5]])

    def measured(tried):
        known = next(first, None)
        return measure(tried) if known is None else known

    assert climb(measured, groups_of(measure.worth), rounds=2, margin=0.5) == {"b": "1"}


def test_failed_runs_are_no_winners():
    measure = Measure({"a": {"1": 2}, "b": {"1": 1}}, {"a-1": None})
    assert climb(measure, groups_of(measure.worth), rounds=1, margin=0.5) == {"b": "1"}
    assert climb(lambda tried: [None] * len(tried), {}, rounds=1, margin=0.5) == {}


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_worth_that_adds_up_is_found_in_one_round(rounds):
    worth = {g: {str(n): (n * k) % 7 - 3 for n in range(4)} for k, g in enumerate("abc", 2)}
    best = climb(Measure(worth), groups_of(worth), rounds=rounds, margin=0.5)
    expected = {}
    for group, levels in worth.items():
        level = max(levels, key=levels.__getitem__)
        if levels[level] > 0.5:
            expected[group] = level
    assert best == expected


def test_one_at_a_time_around_a_change():
    groups = groups_of({"a": {"1": 0, "2": 0}, "b": {"1": 0}})
    tried = one_at_a_time(groups, {"a": "1"})
    assert tried == [{"a": "2"}, {}, {"a": "1", "b": "1"}]

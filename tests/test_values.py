"""Meaning of a text by the type of the option: a value, or a refusal with a hint."""

from pathlib import Path

import numpy as np
import pytest

from selcon_plugin.values import (
    RefusedValueError,
    Written,
    from_command_line,
    is_empty,
    read_value,
    shown,
    written,
)

REFUSED = object()

# Text, then its value as a whole number, a number, a switch and a text.
TABLE = [
    ("3", 3, 3.0, REFUSED, "3"),
    ("+5", 5, 5.0, REFUSED, "+5"),
    ("-5", -5, -5.0, REFUSED, "-5"),
    ("010", 10, 10.0, REFUSED, "010"),
    ("0001", 1, 1.0, REFUSED, "0001"),
    ("0o10", 8, 8.0, REFUSED, "0o10"),
    ("0x10", 16, 16.0, REFUSED, "0x10"),
    ("0b11", 3, 3.0, REFUSED, "0b11"),
    ("1_000", 1000, 1000.0, REFUSED, "1_000"),
    ("_1", REFUSED, REFUSED, REFUSED, "_1"),
    ("1__0", REFUSED, REFUSED, REFUSED, "1__0"),
    ("1e3", 1000, 1000.0, REFUSED, "1e3"),
    ("1e-3", REFUSED, 0.001, REFUSED, "1e-3"),
    ("5E-1", REFUSED, 0.5, REFUSED, "5E-1"),
    ("2.0", 2, 2.0, REFUSED, "2.0"),
    ("2.5", REFUSED, 2.5, REFUSED, "2.5"),
    (".5", REFUSED, 0.5, REFUSED, ".5"),
    ("5.", 5, 5.0, REFUSED, "5."),
    ("0,5", REFUSED, REFUSED, REFUSED, "0,5"),
    ("1,000", REFUSED, REFUSED, REFUSED, "1,000"),
    ("50%", REFUSED, REFUSED, REFUSED, "50%"),
    ("1/2", REFUSED, REFUSED, REFUSED, "1/2"),
    ("1:30", REFUSED, REFUSED, REFUSED, "1:30"),
    ("2024-01-31", REFUSED, REFUSED, REFUSED, "2024-01-31"),
    ("20240131", 20240131, 20240131.0, REFUSED, "20240131"),
    ("1 000", REFUSED, REFUSED, REFUSED, "1 000"),
    ("٣", REFUSED, REFUSED, REFUSED, "٣"),
    ("1" * 5000, REFUSED, REFUSED, REFUSED, "1" * 5000),
    ("9" * 20, REFUSED, 1e20, REFUSED, "9" * 20),
    ("inf", REFUSED, REFUSED, REFUSED, "inf"),
    (".inf", REFUSED, REFUSED, REFUSED, ".inf"),
    ("nan", REFUSED, REFUSED, REFUSED, "nan"),
    ("1e999", REFUSED, REFUSED, REFUSED, "1e999"),
    ("True", REFUSED, REFUSED, True, "True"),
    ("yes", REFUSED, REFUSED, True, "yes"),
    ("ON", REFUSED, REFUSED, True, "ON"),
    ("false", REFUSED, REFUSED, False, "false"),
    ("off", REFUSED, REFUSED, False, "off"),
    ("y", REFUSED, REFUSED, REFUSED, "y"),
    ("1", 1, 1.0, REFUSED, "1"),
    ("none", REFUSED, REFUSED, REFUSED, "none"),
    ("~", REFUSED, REFUSED, REFUSED, REFUSED),
    ("null", REFUSED, REFUSED, REFUSED, REFUSED),
    ("None", REFUSED, REFUSED, REFUSED, REFUSED),
    ("[1,2]", REFUSED, REFUSED, REFUSED, "[1,2]"),
    ("5,", REFUSED, REFUSED, REFUSED, "5,"),
    ("'5'", 5, 5.0, REFUSED, "5"),
    ("'None'", REFUSED, REFUSED, REFUSED, "None"),
    ("", REFUSED, REFUSED, REFUSED, ""),
]

LISTS = [
    ("[64, 32]", int, [64, 32]),
    ("(64,32)", int, [64, 32]),
    ("64,32", int, [64, 32]),
    ("[064, 32,]", int, [64, 32]),
    ("[6.5]", int, REFUSED),
    ("[yes]", int, REFUSED),
    ("64", int, REFUSED),
    ("[64", int, REFUSED),
    ("[64]]", int, REFUSED),
    ("[64 32]", int, REFUSED),
    ("[,]", int, REFUSED),
    ("[[1]]", int, REFUSED),
    ("[" * 50 + "]" * 50, None, REFUSED),
    ("[1, 1e-3]", float, [1.0, 0.001]),
    ("('Market1501',)", str, ["Market1501"]),
    ("('Market1501')", str, ["Market1501"]),
    ('["a, b", c]', str, ["a, b", "c"]),
    ("[0001, 2024-01-31]", str, ["0001", "2024-01-31"]),
    ("Market1501", str, REFUSED),
    ("None", str, REFUSED),
    ("()", str, []),
    ("[['a', 'mAP', 1, 0.5]]", None, [["a", "mAP", 1, 0.5]]),
    ("[a, true, null, 010, '010']", None, ["a", True, None, 10, "010"]),
]


def outcome(raw, kind, item=None):
    try:
        return read_value(raw, kind, item=item)
    except RefusedValueError:
        return REFUSED


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0][:12])
def test_meaning_of_a_word(row):
    raw = from_command_line(row[0])
    for kind, expected in zip((int, float, bool, str), row[1:], strict=True):
        found = outcome(raw, kind)
        assert found is expected or (found == expected and type(found) is kind), kind


@pytest.mark.parametrize(("text", "item", "expected"), LISTS)
def test_meaning_of_a_list(text, item, expected):
    for kind in (list, tuple):
        found = outcome(from_command_line(text), kind, item)
        assert found is expected or found == kind(expected)


def test_hint_names_the_remedy():
    for text, kind, hint in [
        ("0,5", float, "decimal point"),
        ("inf", float, "finite"),
        ("Market1501", list, "[Market1501]"),
        ("None", str, '""'),
        ("9" * 20, int, "too large"),
    ]:
        with pytest.raises(RefusedValueError) as caught:
            read_value(Written(text), kind)
        assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3), (2.0, int, 2), (2.5, int, REFUSED), (True, int, REFUSED),
        (1, float, 1.0), (1e-5, float, 1e-5), (True, float, REFUSED), (1, bool, REFUSED),
        (float("inf"), float, REFUSED), (np.float32(0.5), float, 0.5),
        (np.int64(3), int, 3),
        (np.bool_(True), bool, True), (None, int, REFUSED), (None, str, REFUSED),
        (Path("a/b"), str, "a/b"), ("null", str, "null"), (20240131, str, "20240131"),
        (("a", "1"), list, ["a", "1"]), ([1, [2.5, "x"]], None, [1, [2.5, "x"]]),
        ("0001", None, "0001"),
    ],
)  # fmt: skip
def test_values_of_python_are_read_by_the_same_rules(value, kind, expected):
    found = outcome(written(value), kind)
    assert found is expected or (found == expected and type(found) is type(expected))


def test_other_objects_of_python_are_refused():
    for value in (object(), {"a": 1}, b"x", np.zeros(3)):
        with pytest.raises(TypeError, match="no number, text or list"):
            written(value)


def test_long_values_are_shortened_in_messages():
    assert len(shown(Written("x" * 500))) <= 80
    assert shown([Written("a", quoted=True), Written("1")]) == "['a', 1]"
    assert is_empty(Written("~"))
    assert not is_empty(Written("~", quoted=True))

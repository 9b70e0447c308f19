from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest

from selcon_plugin.methods import method_options
from selcon_plugin.options import Choice, Interval, Option, check_options, options_of


class Example:
    def __init__(
        self,
        size: int,
        *,
        count: Annotated[int, Interval(1)] = 3,
        share: Annotated[float, Interval(0, 1, above=True)] = 0.5,
        mode: Annotated[str, Choice(("fast", "exact"))] = "fast",
        flag: bool = False,
        limit: Annotated[float | Literal["auto"], Interval(0, 1, above=True)] = "auto",
        level: int | Literal["low", "high"] = 2,
    ) -> None: ...


OPTIONS = options_of(Example)


def test_keyword_arguments_are_the_options() -> None:
    assert list(OPTIONS) == ["count", "share", "mode", "flag", "limit", "level"]
    assert OPTIONS["count"] == Option("count", 3, int, Interval(1))
    assert OPTIONS["flag"] == Option("flag", False, bool, None)
    unit = Interval(0, 1, above=True)
    assert OPTIONS["limit"] == Option("limit", "auto", float, unit, ("auto",))
    assert OPTIONS["level"] == Option("level", 2, int, None, ("low", "high"))


def test_legal_values_pass_and_whole_numbers_widen_to_float() -> None:
    values = {"count": 1, "share": 1, "mode": "exact", "flag": True}
    checked = check_options(OPTIONS, values, owner="Example")
    assert checked == values
    assert isinstance(checked["share"], float)


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", "auto"), ("limit", 0.5), ("limit", 1), ("level", "high"), ("level", -3)],
)
def test_a_number_or_a_word(name: str, value: Any) -> None:
    checked = OPTIONS[name].check(value)
    assert checked == value
    assert isinstance(checked, str if isinstance(value, str) else OPTIONS[name].kind)


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("count", 0, "a whole number >= 1"),
        ("count", 2.0, "a whole number >= 1"),
        ("count", True, "a whole number >= 1"),
        ("share", 0.0, "a number > 0 and <= 1"),
        ("share", 1.5, "a number > 0 and <= 1"),
        ("share", math.nan, "a number > 0 and <= 1"),
        ("share", "0.5", "a number > 0 and <= 1"),
        ("share", False, "a number > 0 and <= 1"),
        ("mode", "slow", "text one of 'fast', 'exact'"),
        ("mode", 1, "text one of 'fast', 'exact'"),
        ("flag", 1, "True or False"),
        ("limit", 0.0, "a number > 0 and <= 1 or 'auto'"),
        ("limit", "Auto", "a number > 0 and <= 1 or 'auto'"),
        ("limit", True, "a number > 0 and <= 1 or 'auto'"),
        ("level", 1.5, "a whole number or 'low' or 'high'"),
        ("level", "auto", "a whole number or 'low' or 'high'"),
    ],
)
def test_error_names_option_value_and_range(name: str, value: Any, legal: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        check_options(OPTIONS, {name: value}, owner="Example")
    assert str(error.value) == f"{name} must be {legal}, got {value!r}"
    with pytest.raises(ValueError, match=rf"^MODEL\.SELCON\.{name.upper()} must be"):
        OPTIONS[name].check(value, label=f"MODEL.SELCON.{name.upper()}")


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"^Example has no option kount; it has count, share"
    ):
        check_options(OPTIONS, {"kount": 3, "count": 2}, owner="Example")


@pytest.mark.parametrize("name", sorted(method_options("SelectiveContrastive")))
def test_every_default_of_the_method_is_legal(name: str) -> None:
    option = method_options("SelectiveContrastive")[name]
    assert option.check(option.default) == option.default

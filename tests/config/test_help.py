"""Documentation of a key, found by its name or a part of it."""

import re
from typing import Annotated

import pytest

from helpers.hosts import needs_fastreid, needs_torchreid
from selcon_plugin.clustering import labeler_names, labeler_options
from selcon_plugin.config.help import ConfigHelp, fill_tables
from selcon_plugin.config.keys import (
    ConfigKeys,
    clustering_options,
    own_method_options,
    run_options,
)
from selcon_plugin.hosts import get_host
from selcon_plugin.methods import method_names
from selcon_plugin.options import Interval, Option, described_names, options_of

KEYS = ConfigKeys("HOST.SELCON", str.upper)
OWN = (Option("DATA.ROOT", "", str, None, meaning="folder of the data"),)
CHECKED = (Option("SOLVER.LR", 0.1, float, Interval(0), meaning="learning rate"),)


@pytest.fixture
def config_help():
    node = KEYS.defaults()
    clustering = node.pop("CLUSTERING")
    defaults = {f"HOST.SELCON.{key}": value for key, value in node.items()}
    defaults |= {f"HOST.SELCON.CLUSTERING.{k}": value for k, value in clustering.items()}
    defaults |= {"DATA.ROOT": "", "SOLVER.LR": 0.1, "SOLVER.OTHER": 3, "DATA.SEED": 1}
    return ConfigHelp(KEYS, "Host", defaults, own=OWN, checked=CHECKED)


def test_every_option_has_a_meaning():
    owners = {"run": run_options(), "clustering": clustering_options()}
    owners |= {name: own_method_options(name) for name in method_names()}
    owners |= {name: labeler_options(name) for name in labeler_names()}
    for owner, options in owners.items():
        for option in options.values():
            assert option.meaning, (owner, option.name)
            assert not option.meaning.endswith("."), (owner, option.name)


def test_meanings_are_read_from_docstrings_of_class_and_base():
    class Base:
        """Base.

        Args:
            first: What comes first.
            second: Something else.
        """

        def __init__(self, *, first: float = 0.5, second: str = "a") -> None: ...

    class Derived(Base):
        """Derived.

        Args:
            third: τ of :class:`~a.b.Loss`, or ``"none"``; a long text that runs
                on in the next line.
            second: Which of ``x`` and ``y``.
            **options: Those of the base.

        Attributes:
            first: Not this.
        """

        def __init__(self, *, third: Annotated[int, Interval(0)] = 1, **options) -> None:
            super().__init__(**options)

    meanings = {name: option.meaning for name, option in options_of(Derived).items()}
    assert meanings == {
        "third": "τ of `Loss`, or `none`; a long text that runs on in the next line",
        "first": "what comes first",
        "second": "which of `x` and `y`",
    }
    assert described_names(Derived.__doc__, "Attributes") == {"first": "not this"}
    assert described_names(None) == {}


def test_explains_who_has_a_key_and_what_differs(config_help):
    text = config_help.explain("HOST.SELCON.TEMPERATURE")
    assert "Default: 0.1 (SelectiveContrastive)" in text
    assert "Default: 0.07 (CAP, O2CAP, ViTC)" in text
    assert "Default: 0.05 (the others)" in text
    assert "Legal: a number > 0\n" in text
    fragments = " ".join(text.split())
    owners = [name for name in method_names() if "temperature" in own_method_options(name)]
    assert f"It belongs to the methods {', '.join(owners)}." in fragments
    assert "HOST.SELCON.METHOD CACL HOST.SELCON.TEMPERATURE 0.05" in fragments
    assert all(len(line) <= 92 for line in text.splitlines()[:-1])


def test_explains_a_key_of_every_run_and_one_of_a_labeler(config_help):
    text = config_help.explain("HOST.SELCON.WAVE_BLOCK")
    assert "It belongs to every run." in text
    assert "one of 'none', 'plain', 'attentive'" in text
    assert "        WAVE_BLOCK: plain" in text
    text = config_help.explain("HOST.SELCON.CLUSTERING.NUM_CLUSTERS")
    assert "the labeler KMeans." in text
    assert "HOST.SELCON.CLUSTERING.LABELER KMeans" in text


def test_explains_keys_of_the_host_and_of_the_data(config_help):
    text = config_help.explain("SOLVER.LR")
    assert "This is a key of Host itself." in text
    assert "Learning rate." in text
    assert "a number >= 0" in text
    assert "Default: 0.1" in text
    assert "Default: 3" in config_help.explain("SOLVER.OTHER")
    assert "Folder of the data." in config_help.explain("DATA.ROOT")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("HOST.SELCON.SEED", "HOST.SELCON.SEED"),
        ("temperature", "HOST.SELCON.TEMPERATURE"),
        ("clustering.k1", "HOST.SELCON.CLUSTERING.K1"),
        ("seed", "HOST.SELCON.SEED"),  # the plugin's before the host's
        ("Other", "SOLVER.OTHER"),
    ],
)
def test_finds_a_key_by_its_end(config_help, text, key):
    assert config_help.find(text) == key


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (
            "temprature",
            r"Host's config has no key temprature; did you mean HOST.SELCON.TEM",
        ),
        ("HOST.SELCON.NUM_PART", r"did you mean HOST\.SELCON\.NUM_PARTS"),
        ("solver", r"solver is a group of keys: SOLVER\.LR, SOLVER\.OTHER"),
        ("qqqq", r"has no key qqqq$"),
    ],
)
def test_unknown_key_names_the_closest(config_help, text, fragments):
    with pytest.raises(ValueError, match=fragments):
        config_help.find(text)


def test_end_of_several_keys_names_them():
    help_ = ConfigHelp(KEYS, "Host", {"A.SIZE": 1, "B.SIZE": 2})
    with pytest.raises(
        ValueError, match=r"size may be A\.SIZE or B\.SIZE: give the full key"
    ):
        help_.find("size")


def test_listing_has_every_key_once(config_help):
    lines = config_help.listing().splitlines()
    keys = [line.split()[0] for line in lines if line.startswith("  ")]
    assert len(keys) == len(set(keys))
    own = {key for key in config_help.defaults if key.startswith("HOST.SELCON.")}
    assert set(keys) == own | {"DATA.ROOT"}
    assert "HOST.SELCON.TEMPERATURE" in config_help.listing()


def test_tables_are_put_between_their_markers():
    text = "# T\n<!-- keys: a -->\nold\n<!-- keys: end -->\nrest\n"
    filled = fill_tables(text, {"a": "| new |"})
    assert filled == "# T\n<!-- keys: a -->\n\n| new |\n\n<!-- keys: end -->\nrest\n"
    assert fill_tables(filled, {"a": "| new |"}) == filled
    with pytest.raises(ValueError, match=r"no place for the table 'b': add .*keys: b -->"):
        fill_tables(text, {"a": "", "b": ""})
    with pytest.raises(ValueError, match=r"there is no table for <!-- keys: a -->"):
        fill_tables(text, {})


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("fastreid", marks=needs_fastreid),
        pytest.param("torchreid", marks=needs_torchreid),
    ],
)
def test_terminal_shows_no_markdown(host):
    config_help = get_host(host).help()
    shown = [config_help.explain(key) for key in config_help.plugin_keys]
    for text in [*shown, config_help.listing()]:
        assert not re.search(r"`|\]\(|\*\*", text), text

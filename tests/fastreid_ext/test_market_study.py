"""The study on Market-1501, with a few synthetic persons in its place."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from helpers.programs import run_program
from market_study.protocols import (
    PROTOCOLS,
    Protocol,
    options_of,
    parse_options,
)
from market_study.runs import Budget, BudgetSpentError, Variant, run_variants
from market_study.split import DATASET_FOLDER
from selcon_plugin.config.checks import flatten_config
from selcon_plugin.hosts import load_config

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark" / "market1501.py"
TINY = {
    "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
    "MODEL.BACKBONE.PRETRAIN": "False",
    "MODEL.SELCON.NUM_PARTS": "2",
    "INPUT.SIZE_TRAIN": "[64, 32]",
    "INPUT.SIZE_TEST": "[64, 32]",
    "SOLVER.IMS_PER_BATCH": "8",
    "DATALOADER.NUM_WORKERS": "0",
}


def all_changes(protocol: Protocol):
    for method, groups in protocol.groups.items():
        for group, levels in groups.items():
            for level in levels:
                yield method, {group: level}


# --- protocols ----------------------------------------------------------------------------


def settings_of(command):
    words = shlex.split(command)
    config, *options = words[words.index("--config-file") + 1 :]
    return flatten_config(yaml.safe_load(load_config(config, options).dump()))


@pytest.mark.parametrize("name", [f"protocol-{name}" for name in PROTOCOLS])
def test_each_change_is_legal_and_changes_something(name):
    protocol = PROTOCOLS[name.removeprefix("protocol-")]

    def settings(method, options):
        config = protocol.configs[method]
        variant = Variant(method, "any", config, options, Path(), Path("any"))
        return settings_of(variant.command())

    base = {m: settings(m, protocol.base(m)) for m in protocol.configs}
    for method, changes in all_changes(protocol):
        if "mixed_precision" in changes and not torch.cuda.is_available():
            continue  # off anyway
        options = options_of(protocol.groups[method], changes)
        found = settings(method, {**protocol.base(method), **options})
        assert {key: found[key] for key in options} == options
        assert found != base[method], changes


def test_all_methods_are_there():
    assert len(PROTOCOLS["gpu"].configs) == 19
    # And the demo's config of scl_paper's method.
    assert len(PROTOCOLS["cpu"].configs) == 20
    assert {"scl", "scl_paper"} < set(PROTOCOLS["cpu"].configs)


def test_fixed_options_leave_their_groups_out():
    protocol = PROTOCOLS["gpu"].with_options({"SOLVER.MAX_EPOCH": 2})
    assert "schedule" not in protocol.groups["selcon_cluster"]
    assert "eps" in protocol.groups["selcon_cluster"]
    assert protocol.base("scl_paper")["SOLVER.MAX_EPOCH"] == 2


def test_only():
    protocol = PROTOCOLS["cpu"]
    assert protocol.only([]) is protocol
    some = protocol.only(["scl/parts", "scl/neighbors", "cap"])
    assert list(some.configs) == ["scl", "cap"]
    assert list(some.groups["scl"]) == ["parts", "neighbors"]
    assert protocol.only(["scl/neighbors/3", "scl/parts"]).groups == {
        "scl": {
            "neighbors": {"3": protocol.groups["scl"]["neighbors"]["3"]},
            "parts": protocol.groups["scl"]["parts"],
        }
    }
    plain = protocol.only(["scl/", "cap/"])
    assert (list(plain.configs), plain.groups) == (["scl", "cap"], {})
    every = protocol.only(["methods"])
    assert (every.configs, every.groups) == (protocol.configs, {})
    for wrong in ("sc", "scl/part", "cap/parts", "scl/neighbors/4", "scl/neighbors/3/4"):
        with pytest.raises(
            ValueError, match=f"--only {wrong}: legal are methods, .*scl/parts"
        ):
            protocol.only([wrong])


def test_options_are_read_as_a_config_reads_them():
    words = ["A.B", "0.5", "C", "(1, 2)", "D", "auto", "E", "False"]
    read = {"A.B": 0.5, "C": (1, 2), "D": "auto", "E": False}
    assert parse_options(words) == read
    with pytest.raises(ValueError, match="the key E has no value"):
        parse_options(["A", "1", "E"])


# --- the whole, in processes of its own ---------------------------------------------------


def study(data, output, *phases, options=TINY, more=()):
    words = [word for pair in options.items() for word in pair]
    command = [
        *(SCRIPT, *phases, "--protocol", "cpu", "--epochs", "1"),
        *("--data", str(data), "--output", str(output)),
        *("--validation-identities", "5", "--report-seeds", "1"),
        *("--only", "scl/mixture_update", *more, "--options", *words),
    ]
    return run_program(*command)


@pytest.fixture(scope="module")
def market(synthetic_persons, tmp_path_factory):
    """Synthetic persons under Market-1501's folder name."""
    root = tmp_path_factory.mktemp("market")
    (root / DATASET_FOLDER).symlink_to(synthetic_persons)
    return root


@pytest.mark.slow
def test_failed_runs_are_named(market, tmp_path):
    done = study(
        market, tmp_path, "choose", options={**TINY, "MODEL.SELCON.NUM_PARTS": "7"}
    )
    assert done.returncode == 1
    assert "Without a finished run: scl base" in done.stdout


@pytest.mark.slow
def test_whole_study_resumes_and_gives_the_commands(market, tmp_path):
    output = tmp_path / "study"
    done = study(market, output, "choose", "--margin", "-100")
    assert done.returncode == 0, done.stderr
    assert "Chosen for scl: mixture_update-self" in done.stdout
    results = output / "choose" / "scl" / "base" / "seed0" / "results.json"
    finished = results.stat().st_mtime_ns

    done = study(market, output, "all", "--margin", "-100")
    assert done.returncode == 0, done.stderr
    assert results.stat().st_mtime_ns == finished  # only read
    page = (output / "tables.md").read_text()
    for title in ("Official test set", "Changes of scl", "Label-free metrics", "Commands"):
        assert f"## {title}" in page
    assert re.search(r"^\| scl chosen \| 1 \|", page, re.MULTILINE)

    # A row's command has the settings that its run had.
    commands = re.findall(r"^\| (\S.*) \| `(.+)` \|$", page, re.MULTILINE)
    assert len(commands) == 4
    for _, command in commands:
        cfg = settings_of(command)
        folder = Path(cfg["OUTPUT_DIR"])
        run = flatten_config(yaml.safe_load((folder / "bench.yaml").read_text()))
        assert cfg == run
        used = shlex.split(command)[0].removeprefix("FASTREID_DATASETS=")
        assert used == str(market if "report" in str(folder) else output / "validation")
    official = json.loads((output / "report/scl/base/seed0/results.json").read_text())
    chosen_on = json.loads(results.read_text())
    assert official["num_images"] > chosen_on["num_images"]


def test_mistakes_end_in_one_line(market, tmp_path):
    missing = study(tmp_path / "none", tmp_path / "out", "choose")
    assert missing.returncode == 2
    assert "--data must be the folder" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_no_time_left(market, tmp_path):
    done = study(market, tmp_path / "out", "choose", "--time-budget", "0")
    assert done.returncode == 75
    assert "same command resumes the study" in done.stdout
    variant = Variant("m", "base", Path("c.yml"), {}, Path(), tmp_path / "m" / "base")
    with pytest.raises(BudgetSpentError):
        run_variants([variant], 1, Budget(0))
    assert not variant.record.exists()

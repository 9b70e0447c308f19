"""Names of earlier releases: accepted wherever a user, or an old file, has them."""

import json
import logging

import pytest
import torch

from selcon_plugin import renamed
from selcon_plugin.config.files import Setting
from selcon_plugin.config.keys import ConfigKeys, own_method_options, run_options
from selcon_plugin.engine.best_weights import BestWeights
from selcon_plugin.losses import selective_contrastive_loss
from selcon_plugin.methods import build_method, method_names
from selcon_plugin.models.wave_block import WaveBlock
from selcon_plugin.renamed import (
    OPTIONS,
    VALUES,
    accept_old_arguments,
    accept_renamed,
    present_settings,
)
from selcon_plugin.runs.metrics import read_metrics
from selcon_plugin.values import Written

KEYS = ConfigKeys("here.selcon", str.upper)


@pytest.fixture(autouse=True)
def _notices_anew(monkeypatch):
    monkeypatch.setattr(renamed, "_noticed", set())


def notices(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_every_present_name_is_an_option_and_no_former_one_is():
    options = run_options()
    for name in method_names():
        options |= own_method_options(name)
    assert set(OPTIONS.values()) <= options.keys()
    assert not OPTIONS.keys() & options.keys()
    for name, by_old in VALUES.items():
        assert set(by_old.values()) <= set(options[name].legal.values)


def test_notice_is_one_line_once_and_names_the_present_name(caplog):
    for _ in range(2):
        assert accept_renamed({"max_bad_share": 0.1}) == {"max_unreadable_ratio": 0.1}
    assert len(notices(caplog)) == 1
    assert "max_bad_share" in notices(caplog)[0]
    assert "max_unreadable_ratio" in notices(caplog)[0]


def test_present_names_bring_no_notice(caplog):
    values = {"max_unreadable_ratio": 0.1, "keep_best_by": "outlier_ratio", "other": 1}
    assert accept_renamed(values) == values
    assert not notices(caplog)


def test_both_names_are_refused():
    with pytest.raises(ValueError, match=r"max_bad_steps and max_nonfinite_steps"):
        accept_renamed({"max_bad_steps": 3, "max_nonfinite_steps": 3})


@pytest.mark.parametrize(
    ("method", "former", "present"),
    [
        ("O2CAP", "image_share", "image_weight"),
        ("PPLR", "part_share", "part_weight"),
        ("CACL", "grey_feature_weight", "gray_feature_weight"),
        ("CACL", "grey_cluster_weight", "gray_cluster_weight"),
    ],
)
def test_options_of_methods(method, former, present, caplog):
    built = build_method(method, 10, 8, 2, 4, **{former: 0.25})
    assert getattr(built, present) == 0.25
    assert present in notices(caplog)[0]
    with pytest.raises(ValueError, match=f"{former} and {present}"):
        build_method(method, 10, 8, 2, 4, **{former: 0.25, present: 0.25})
    with pytest.raises(ValueError, match=f"{present} must be"):
        build_method(method, 10, 8, 2, 4, **{former: -1.0})


def test_unset_former_name_is_dropped(caplog):
    values = {"max_bad_share": None, "max_unreadable_ratio": 0.25, "part_share": None}
    present = {"max_unreadable_ratio": 0.25, "part_weight": None}
    assert accept_renamed(values) == present
    assert accept_renamed(dict(reversed(values.items()))) == present
    assert not notices(caplog)
    unset = {"max_bad_share": 0.25, "max_unreadable_ratio": None}
    assert accept_renamed(unset) == {"max_unreadable_ratio": 0.25}
    assert accept_renamed(dict(reversed(unset.items()))) == {"max_unreadable_ratio": 0.25}


def test_arguments_of_functions(caplog):
    @accept_old_arguments
    def function(first, *, max_unreadable_ratio=0.05, license=""):
        return first, max_unreadable_ratio, license

    assert function(1, max_bad_share=0.5, licence="MIT") == (1, 0.5, "MIT")
    assert function(1, max_unreadable_ratio=0.2) == (1, 0.2, "")
    assert len(notices(caplog)) == 2
    with pytest.raises(ValueError, match="max_bad_share and max_unreadable_ratio"):
        function(1, max_bad_share=0.5, max_unreadable_ratio=0.5)
    assert WaveBlock(band_share=0.5).band_ratio == 0.5


def test_arguments_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, 4, generator=generator), dim=1)
    bank = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1)
    rows = (torch.tensor([[0], [1]]), torch.tensor([[2, 3], [4, 5]]))
    masks = (torch.tensor([[True], [True]]), torch.tensor([[True, False]] * 2))
    weight = torch.ones(1)
    former = selective_contrastive_loss(
        features,
        bank,
        *rows,
        positive_weight=weight,
        exempt_positive=masks[0],
        exempt_negative=masks[1],
    )
    present = selective_contrastive_loss(
        features,
        bank,
        *rows,
        positive_weight=weight,
        ignored_positive=masks[0],
        ignored_negative=masks[1],
    )
    assert torch.equal(former, present)


# --- configs ------------------------------------------------------------------------------


def test_former_keys_in_a_node_that_a_script_filled(caplog):
    node = {**KEYS.defaults(), **KEYS.former_keys()}
    node |= {"MAX_BAD_SHARE": 0.25, "KEEP_BEST_BY": "outlier_share"}
    KEYS.check(node)
    assert node["MAX_UNREADABLE_RATIO"] == 0.25
    assert node["KEEP_BEST_BY"] == "outlier_ratio"
    assert not KEYS.former_keys().keys() & node.keys()
    assert any("here.selcon.MAX_UNREADABLE_RATIO" in line for line in notices(caplog))


def test_unset_former_keys_leave_no_trace(caplog):
    node = {**KEYS.defaults(), **KEYS.former_keys()}
    present = KEYS.defaults()
    KEYS.check(node)
    KEYS.check(present)
    assert node == present
    assert not notices(caplog)


def test_both_keys_in_a_node_are_refused():
    node = {**KEYS.defaults(), "MAX_BAD_STEPS": 3, "MAX_NONFINITE_STEPS": 4}
    match = r"here\.selcon\.MAX_BAD_STEPS and here\.selcon\.MAX_NONFINITE_STEPS"
    with pytest.raises(ValueError, match=match):
        KEYS.check(node)


def test_value_under_a_former_key_is_checked_under_the_present_one():
    node = {**KEYS.defaults(), "OUTLIER_SHARE": 1.5}
    with pytest.raises(ValueError, match=r"OUTLIER_RATIO must be .*< 1, got 1\.5"):
        KEYS.check(node)


def test_settings_of_a_file_or_a_command_line():
    half, one = Setting(Written("0.5"), "f, line 1"), Setting(Written("1"), "f, line 2")
    given = {"here.selcon.OUTLIER_SHARE": half, "other.OUTLIER_SHARE": one}
    renamed = {"here.selcon.OUTLIER_RATIO": half, "other.OUTLIER_SHARE": one}
    assert KEYS.rename_entries(given) == renamed
    null = {"here.selcon.OUTLIER_SHARE": Setting(Written("null"), "f, line 1")}
    assert KEYS.rename_entries(null) == {}
    both = {**given, "here.selcon.OUTLIER_RATIO": one}
    with pytest.raises(ValueError, match=r"f, line 1: .*OUTLIER_SHARE and .*OUTLIER_RATIO"):
        KEYS.rename_entries(both)


def test_former_key_is_explained_as_the_present_one():
    assert KEYS.present_key("max_bad_share") == "MAX_UNREADABLE_RATIO"
    assert KEYS.present_key("here.selcon.PART_SHARE") == "here.selcon.PART_WEIGHT"
    assert KEYS.present_key("here.selcon.SEED") == "here.selcon.SEED"


# --- files of earlier runs ----------------------------------------------------------------


def test_metrics_of_an_earlier_run(tmp_path, caplog):
    line = {
        "iteration": 3,
        "outlier_share": 0.5,
        "found_outlier_share": 0.25,
        "largest_cluster_share": 0.125,
        "loss_grey": 1.0,
        "loss_grey_feature": 2.0,
        "loss_grey_cluster": 3.0,
        "mAP": 50.0,
    }
    (tmp_path / "metrics.json").write_text(json.dumps(line) + "\n")
    assert read_metrics(tmp_path / "metrics.json") == [
        {
            "iteration": 3,
            "outlier_ratio": 0.5,
            "found_outlier_ratio": 0.25,
            "largest_cluster_ratio": 0.125,
            "loss_gray": 1.0,
            "loss_gray_feature": 2.0,
            "loss_gray_cluster": 3.0,
            "mAP": 50.0,
        }
    ]
    assert not notices(caplog)  # nobody can change them


def test_settings_of_an_earlier_run():
    former = {
        "MODEL.SELCON.MAX_BAD_SHARE": 0.25,
        "MODEL.SELCON.KEEP_BEST_BY": "outlier_share",
        "selcon.part_share": 0.5,
        "other.part_share": 1,
        "SOLVER.MAX_EPOCH": 2,
    }
    assert present_settings(former) == {
        "MODEL.SELCON.MAX_UNREADABLE_RATIO": 0.25,
        "MODEL.SELCON.KEEP_BEST_BY": "outlier_ratio",
        "selcon.part_weight": 0.5,
        "other.part_share": 1,
        "SOLVER.MAX_EPOCH": 2,
    }


def test_best_weights_of_an_earlier_checkpoint():
    best = BestWeights("outlier_ratio", lambda epochs: None)
    best.load_state_dict({"figure": "outlier_share", "value": 0.25})
    assert best.value == 0.25
    other = BestWeights("stability", lambda epochs: None)
    other.load_state_dict({"figure": "outlier_share", "value": 0.25})
    assert other.value is None


@pytest.mark.parametrize("prefix", ["", "method.", "module.method."])
def test_tensors_of_an_earlier_checkpoint(prefix):
    method = build_method("CACL", 10, 8)
    method.gray_memory.bank.normal_(generator=torch.Generator().manual_seed(1))
    former = {
        prefix + name.replace("gray", "grey"): tensor
        for name, tensor in method.state_dict().items()
    }
    assert any("grey_memory" in name for name in former)
    network = torch.nn.Module()
    for part in reversed(prefix.split(".")[:-1]):
        outer = torch.nn.Module()
        outer.add_module(part, network)
        network = outer
    fresh = build_method("CACL", 10, 8)
    owner = network
    parts = prefix.split(".")[:-1]
    for part in parts[:-1]:
        owner = getattr(owner, part)
    if parts:
        setattr(owner, parts[-1], fresh)
    else:
        network = fresh
    network.load_state_dict(former)
    assert torch.equal(fresh.gray_memory.bank, method.gray_memory.bank)

import copy
import re
from typing import Annotated

import pytest
from fastreid.config import get_cfg

from selcon_plugin.fastreid_ext import SelConTrainer, add_selcon_config, complete_config
from selcon_plugin.fastreid_ext.config import selected_method_options
from selcon_plugin.fastreid_ext.results import write_results
from selcon_plugin.hosts import load_config
from selcon_plugin.methods import base, build_method, method_names, method_options
from selcon_plugin.methods.selective_contrastive import SelectiveContrastive
from selcon_plugin.options import Interval, Option


def test_config_key_is_constructor_argument():
    cfg = add_selcon_config(get_cfg())
    for name in method_names():
        cfg.MODEL.SELCON.METHOD = name
        options = selected_method_options(cfg)
        method = build_method(name, 10, 4, 2, 2, **options)
        default = build_method(name, 10, 4, 2, 2)
        assert str(method) == str(default)
        for option in method_options(name).values():
            assert option.name.upper() in cfg.MODEL.SELCON


def test_host_defaults_stay_untouched():
    add_selcon_config(get_cfg())
    assert "SELCON" not in get_cfg().MODEL


def test_one_line_is_enough(tmp_path):
    file = tmp_path / "one_line.yml"
    file.write_text("MODEL:\n  META_ARCHITECTURE: SelCon\n")
    cfg = load_config(str(file))
    assert cfg.MODEL.SELCON.METHOD == "SelectiveContrastive"
    assert cfg.is_frozen()


def test_script_without_add_selcon_config_gets_the_defaults():
    assert complete_config(get_cfg()).MODEL.SELCON.NUM_NEIGHBORS == 7


def test_complete_config_shows_what_the_method_and_labeler_use():
    cfg = add_selcon_config(get_cfg())
    assert cfg.MODEL.SELCON.TEMPERATURE is None  # methods differ
    cfg.MODEL.SELCON.METHOD = "ClusterContrast"
    cfg = complete_config(cfg)
    assert cfg.MODEL.SELCON.TEMPERATURE == 0.05
    assert cfg.MODEL.SELCON.NUM_NEIGHBORS is None  # it has none
    assert cfg.MODEL.SELCON.CLUSTERING.EPS == 0.6
    assert str(complete_config(cfg)) == str(cfg)


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("TEMPERATURE", "0.0", ["MODEL.SELCON.TEMPERATURE", "> 0", "0.0"]),
        ("NUM_NEIGHBORS", "-1", ["MODEL.SELCON.NUM_NEIGHBORS", ">= 0", "-1"]),
        ("SELF_WEIGHT", "1.5", ["MODEL.SELCON.SELF_WEIGHT", "<= 1", "1.5"]),
        ("MIXTURE_UPDATE", "all", ["MODEL.SELCON.MIXTURE_UPDATE", "'self'", "'all'"]),
        ("METHOD", "Magic", ["MODEL.SELCON.METHOD", "'SelectiveContrastive'", "'Magic'"]),
        ("NUM_PARTS", "-2", ["MODEL.SELCON.NUM_PARTS", ">= 0", "-2"]),
        ("NUM_NEGATIVES", "many", ["MODEL.SELCON.NUM_NEGATIVES", "many", ">= 1"]),
    ],
)
def test_illegal_value_names_key_value_and_legal_range(key, value, fragments):
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        load_config("", [f"MODEL.SELCON.{key}", value])
    assert all(word in str(caught.value) for word in fragments)


def test_unknown_key_suggests_the_right_one(tmp_path):
    file = tmp_path / "typo.yml"
    file.write_text("MODEL:\n  SELCON:\n    NUMNEIGHBORS: 3\n")
    with pytest.raises(ValueError, match=r"NUMNEIGHBORS.*typo.yml.*NUM_NEIGHBORS"):
        load_config(str(file))


def test_whole_number_is_a_number():
    value = load_config("", ["MODEL.SELCON.EMA_DECAY", "0"]).MODEL.SELCON.EMA_DECAY
    assert (value, type(value)) == (0.0, float)


def test_command_line_may_put_a_word_in_place_of_a_files_number(tmp_path):
    file = tmp_path / "eps.yml"
    file.write_text("MODEL:\n  SELCON:\n    CLUSTERING:\n      EPS: 0.5\n      K1: 20\n")
    key = "MODEL.SELCON.CLUSTERING.EPS"
    assert load_config(str(file)).MODEL.SELCON.CLUSTERING.EPS == 0.5
    cfg = load_config(str(file), [key, "auto", "MODEL.SELCON.CLUSTERING.K2", "3"])
    assert cfg.MODEL.SELCON.CLUSTERING.EPS == "auto"
    assert cfg.MODEL.SELCON.CLUSTERING.K1 == 20
    assert load_config("", [key, "1"]).MODEL.SELCON.CLUSTERING.EPS == 1
    with pytest.raises(ValueError, match=r"EPS must be a number > 0 and <= 1 or 'auto'"):
        load_config(str(file), [key, "often"])


def test_folder_and_pattern_are_taken_as_they_are():
    cfg = load_config("", images="2024", camera_pattern="[12]")
    assert cfg.DATASETS.IMAGE_FOLDER.ROOT == "2024"
    assert cfg.DATASETS.IMAGE_FOLDER.CAMERA_PATTERN == "[12]"
    assert cfg.DATASETS.NAMES == ("ImageFolderReID",)
    assert cfg.DATASETS.TESTS == ()


def test_method_of_a_users_own_script_is_one_more_choice(monkeypatch):
    monkeypatch.setattr(base, "_METHODS", copy.copy(base._METHODS))

    @base.register_method("Mine")
    class Mine(SelectiveContrastive):
        def __init__(
            self,
            num_images: int,
            global_dim: int,
            num_parts: int = 0,
            part_dim: int = 0,
            *,
            my_weight: Annotated[float, Interval(0)] = 2.0,
        ) -> None:
            super().__init__(num_images, global_dim, num_parts, part_dim)

    cfg = load_config("", ["MODEL.SELCON.METHOD", "Mine", "MODEL.SELCON.MY_WEIGHT", "3.0"])
    assert selected_method_options(cfg) == {"my_weight": 3.0}
    with pytest.raises(ValueError, match=r"MODEL\.SELCON\.MY_WEIGHT.*>= 0.*-1"):
        load_config("", ["MODEL.SELCON.METHOD", "Mine", "MODEL.SELCON.MY_WEIGHT", "-1.0"])


def test_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yml"):
        load_config("nowhere.yml")


def test_without_cuda_the_run_moves_to_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = load_config("", ["SOLVER.AMP.ENABLED", "True"])
    assert cfg.MODEL.DEVICE == "cpu"
    assert not cfg.SOLVER.AMP.ENABLED


def test_mixed_precision_on_a_cpu_is_bfloat16(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = load_config("", ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"])
    assert cfg.SOLVER.AMP.ENABLED
    load_config("", ["SOLVER.AMP.ENABLED", "True"])
    assert "On a CPU use SOLVER.AMP.DTYPE bfloat16" in caplog.text
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.DTYPE.*'float16'.*'half'"):
        load_config("", ["SOLVER.AMP.DTYPE", "half"])


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch, capability):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    options = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]
    if capability >= (8, 0):
        assert load_config("", options).SOLVER.AMP.DTYPE == "bfloat16"
        return
    with pytest.raises(ValueError, match="which Tesla T4 cannot compute in"):
        load_config("", options)


def test_camera_term_excludes_reranking():
    with pytest.raises(ValueError, match="RERANK"):
        load_config(
            "", ["MODEL.SELCON.TEST_CAMERA_TERM", "True", "TEST.RERANK.ENABLED", "True"]
        )


# --- names of earlier releases ------------------------------------------------------------

NODE = "MODEL:\n  SELCON:\n"


def test_former_keys_in_a_file_its_base_and_the_command_line(tmp_path):
    (tmp_path / "base.yml").write_text(
        f"{NODE}    OUTLIER_RATIO: 0.5\n    MAX_BAD_SHARE: 0.25\n    MAX_BAD_STEPS: 2\n"
    )
    file = tmp_path / "run.yml"
    file.write_text(
        f"_BASE_: base.yml\n{NODE}    OUTLIER_SHARE: 0.25\n"
        "    KEEP_BEST_BY: outlier_share\n    MAX_NONFINITE_STEPS: 4\n"
    )
    opts = ["MODEL.SELCON.ON_BAD_NUMBERS", "stop", "MODEL.SELCON.MAX_BAD_SHARE", "0.125"]
    node = load_config(str(file), opts).MODEL.SELCON
    # What a file sets takes the place of what its base does, whatever each calls it.
    assert node.OUTLIER_RATIO == 0.25
    assert node.MAX_NONFINITE_STEPS == 4
    assert node.KEEP_BEST_BY == "outlier_ratio"
    assert node.ON_NONFINITE == "stop"
    assert node.MAX_UNREADABLE_RATIO == 0.125
    assert not {"OUTLIER_SHARE", "MAX_BAD_SHARE", "ON_BAD_NUMBERS"} & node.keys()


def test_both_names_in_one_place_are_refused(tmp_path):
    file = tmp_path / "run.yml"
    file.write_text(f"{NODE}    OUTLIER_RATIO: 0.5\n    OUTLIER_SHARE: 0.5\n")
    match = r"MODEL\.SELCON\.OUTLIER_SHARE and MODEL\.SELCON\.OUTLIER_RATIO"
    with pytest.raises(ValueError, match=match):
        load_config(str(file))
    opts = ["MODEL.SELCON.OUTLIER_RATIO", "0.5", "MODEL.SELCON.OUTLIER_SHARE", "0.5"]
    with pytest.raises(ValueError, match=match):
        load_config("", opts)


def test_script_that_merges_a_file_with_former_keys(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"{NODE}    METHOD: PPLR\n    PART_SHARE: 0.25\n    MAX_BAD_STEPS: 3\n")
    cfg = add_selcon_config(get_cfg())
    cfg.merge_from_file(str(file))
    cfg = complete_config(cfg)
    assert cfg.MODEL.SELCON.PART_WEIGHT == 0.25
    assert cfg.MODEL.SELCON.MAX_NONFINITE_STEPS == 3
    assert selected_method_options(cfg)["part_weight"] == 0.25


# --- one check ----------------------------------------------------------------------------


def test_checked_config_is_not_checked_again(monkeypatch):
    checks = []
    check = Option.check

    def counted(self, value, *, label=None):
        checks.append(label or self.name)
        return check(self, value, label=label)

    monkeypatch.setattr(Option, "check", counted)
    cfg = complete_config(get_cfg())
    assert checks
    assert max(map(checks.count, checks)) == 1
    number = len(checks)
    again = complete_config(copy.deepcopy(cfg))
    assert len(checks) == number
    assert str(again) == str(cfg)
    again.MODEL.SELCON.SEED = -1
    with pytest.raises(ValueError, match=r"SEED must be .*>= 0 .*got -1"):
        complete_config(again)


def test_training_checks_each_key_once(tiny_cfg, monkeypatch):
    tiny_cfg.MODEL.SELCON.METHOD = "ClusterContrast"
    for key in ("NUM_NEIGHBORS", "NUM_NEGATIVES", "WARMUP_EPOCHS"):
        tiny_cfg.MODEL.SELCON[key] = None
    tiny_cfg.SOLVER.MAX_EPOCH = tiny_cfg.TEST.EVAL_PERIOD = 1
    checks = []
    check = Option.check

    def counted(self, value, *, label=None):
        checks.append(label or self.name)
        return check(self, value, label=label)

    monkeypatch.setattr(Option, "check", counted)
    trainer = SelConTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    write_results(trainer, results)
    assert "MODEL.SELCON.CLUSTERING.PERIOD" in checks
    twice = {name for name in checks if checks.count(name) > 1}
    assert not twice


@pytest.mark.parametrize("add", [add_selcon_config, lambda cfg: cfg], ids=["added", "not"])
def test_precise_statistics_follow_the_training_data(add) -> None:
    cfg = add(get_cfg())
    cfg.merge_from_list(["DATASETS.NAMES", "('DukeMTMC', 'MSMT17')"])
    cfg.TEST.PRECISE_BN.ENABLED = True
    assert complete_config(cfg).TEST.PRECISE_BN.DATASET == "DukeMTMC"
    cfg.TEST.PRECISE_BN.DATASET = "MSMT17"  # as a person chooses
    assert complete_config(cfg).TEST.PRECISE_BN.DATASET == "MSMT17"

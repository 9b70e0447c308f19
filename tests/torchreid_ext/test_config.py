"""The config in torchreid's style: its keys, the plugin's, and how mistakes are told."""

from pathlib import Path

import pytest
import torch
import yaml

from selcon_plugin.clustering import labeler_names, labeler_options
from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.files import builtin_config
from selcon_plugin.config.keys import clustering_options, own_method_options
from selcon_plugin.engine.run_options import RunOptions
from selcon_plugin.hosts import host_of, load_config
from selcon_plugin.methods import build_method, method_names
from selcon_plugin.torchreid_ext.config import (
    KEYS,
    complete_config,
    get_default_config,
    keys_without_effect,
)
from selcon_plugin.torchreid_ext.options import EngineOptions

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [str(file.relative_to(CONFIGS)) for file in sorted(CONFIGS.rglob("*.yml"))]

# As in torchreid's scripts/default_config.py.
TORCHREIDS_DEFAULTS = {
    "model.name": "resnet50",
    "model.pretrained": True,
    "data.sources": ["market1501"],
    "data.height": 256,
    "data.width": 128,
    "data.transforms": ["random_flip"],
    "data.norm_mean": [0.485, 0.456, 0.406],
    "data.save_dir": "log",
    "sampler.num_instances": 4,
    "train.optim": "adam",
    "train.lr": 0.0003,
    "train.weight_decay": 5e-4,
    "train.max_epoch": 60,
    "train.batch_size": 32,
    "train.lr_scheduler": "single_step",
    "train.stepsize": [20],
    "train.open_layers": ["classifier"],
    "train.seed": 1,
    "sgd.momentum": 0.9,
    "test.batch_size": 100,
    "test.dist_metric": "euclidean",
    "test.ranks": [1, 5, 10, 20],
    "test.eval_freq": -1,
}


def written(tmp_path, **nodes):
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(nodes))
    return str(file)


def load(*opts, file="", **options):
    return load_config(file, list(opts), host="torchreid", **options)


def test_defaults_are_those_of_torchreids_script():
    flat = flatten_config(get_default_config())
    assert {key: flat[key] for key in TORCHREIDS_DEFAULTS} == TORCHREIDS_DEFAULTS
    assert flat["use_gpu"] == torch.cuda.is_available()


def test_defaults_are_not_shared():
    get_default_config().train.stepsize.append(7)
    assert get_default_config().train.stepsize == [20]


@pytest.mark.parametrize("method", method_names())
def test_every_option_of_a_method_is_a_key(method):
    cfg = get_default_config()
    cfg.selcon.method = method
    node = complete_config(cfg).selcon
    for name, option in own_method_options(method).items():
        assert node[name] == option.default, name
    options = KEYS.selected(node, "method")
    assert str(build_method(method, 10, 4, 2, 2, **options)) == str(
        build_method(method, 10, 4, 2, 2)
    )


@pytest.mark.parametrize("labeler", labeler_names())
def test_every_option_of_a_labeler_is_a_key(labeler):
    cfg = get_default_config()
    cfg.selcon.clustering.labeler = labeler
    node = complete_config(cfg).selcon.clustering
    for name, option in {**clustering_options(), **labeler_options(labeler)}.items():
        if name != "labeler":
            assert node[name] == option.default, name


def test_keys_are_fastreids_in_lower_case():
    pytest.importorskip("fastreid")
    from fastreid.config import get_cfg

    from selcon_plugin.fastreid_ext import add_selcon_config
    from selcon_plugin.fastreid_ext import config as other

    here = flatten_config(get_default_config().selcon)
    there = flatten_config(add_selcon_config(get_cfg()).MODEL.SELCON)
    only_here, only_there = (
        {option.name for option in keys.extra} for keys in (KEYS, other.KEYS)
    )
    shared = {key: value for key, value in here.items() if key not in only_here}
    assert shared == {
        key.lower(): value for key, value in there.items() if key.lower() not in only_there
    }


def test_complete_config_shows_what_method_and_labeler_use():
    cfg = get_default_config()
    assert cfg.selcon.temperature is None  # methods differ
    cfg.selcon.method = "ClusterContrast"
    complete = complete_config(cfg)
    assert complete.selcon.temperature == 0.05
    assert complete.selcon.num_neighbors is None  # it has none
    assert complete.selcon.clustering.eps == 0.6
    assert cfg.selcon.temperature is None  # the given config is left as it was
    assert str(complete_config(complete)) == str(complete)


def test_what_a_script_opens_is_the_head_where_there_is_no_classifier():
    cfg = complete_config(get_default_config())
    assert cfg.train.open_layers == cfg.train.new_layers == ["heads"]
    assert load("train.open_layers", "['backbone']").train.open_layers == ["backbone"]


@pytest.mark.parametrize(
    ("opts", "seed"),
    [
        ([], 0),
        (["train.seed", "5"], 5),
        (["selcon.seed", "3"], 3),
        (["selcon.seed", "3", "train.seed", "5"], 3),
    ],
)
def test_torchreids_seed_is_the_seed(opts, seed):
    assert load(*opts).selcon.seed == seed


def test_unknown_key_suggests_the_right_one(tmp_path):
    file = written(tmp_path, selcon={"numneighbors": 3})
    match = r"numneighbors in .*config\.yml, line 2; did you mean selcon\.num_neighbors"
    with pytest.raises(ValueError, match=match):
        load(file=file)
    with pytest.raises(
        ValueError,
        match=r"train\.max_epochs in the command line; did you mean train\.max_epoch",
    ):
        load("train.max_epochs", "3")


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        (
            "selcon.temperature",
            "0.0",
            r"selcon\.temperature .*> 0.*got 0\.0",
        ),
        ("selcon.method", "Magic", r"selcon\.method .*'Selective.*got 'Magic'"),
        ("selcon.num_parts", "-2", r"selcon\.num_parts .*>= 0 .*got -2"),
        ("selcon.pool", "mean", r"selcon\.pool .*'gem', got 'mean'"),
        ("selcon.last_stride", "3", r"selcon\.last_stride .*<= 2, got 3"),
        ("selcon.checkpoint_period", "-1", r"checkpoint_period .*>= 0, got -1"),
        ("selcon.clustering.eps", "1.5", r"selcon\.clustering\.eps .*or 'auto'"),
        ("selcon.clustering.eps", "often", r"clustering\.eps .*got 'often'"),
        ("selcon.clustering.labeler", "Magic", r"clustering\.labeler .*'DBSCAN'"),
        ("selcon.clustering.period", "0", r"clustering\.period .*>= 1, got 0"),
        ("selcon.clustering.num_clusters", "7", r"labeler DBSCAN has no such option"),
        ("selcon.cluster_update", "hard", r"method SelectiveContrastive has no such opt"),
        ("data.type", "video", r"data\.type is 'video'.* needs 'image'"),
    ],
)
def test_illegal_value_names_key_value_and_legal_range(key, value, fragments):
    with pytest.raises(ValueError, match=fragments):
        load(key, value)


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("selcon.ema_decay", "no", r"a number >= 0 and < 1, got 'no'"),
        ("selcon.num_parts", "many", r"selcon\.num_parts must be a whole number.*'many'"),
        ("train.lr", "fast", r"train\.lr must be a number.*'fast'"),
    ],
)
def test_wrong_type_names_what_to_write(key, value, fragments):
    with pytest.raises(ValueError, match=fragments):
        load(key, value)


def test_command_line_may_put_a_word_in_place_of_a_files_number(tmp_path):
    file = written(tmp_path, selcon={"clustering": {"eps": 0.5, "k1": 20}})
    assert load(file=file).selcon.clustering.eps == 0.5
    node = load("selcon.clustering.eps", "auto", file=file).selcon.clustering
    assert (node.eps, node.k1) == ("auto", 20)
    file = written(tmp_path, selcon={"clustering": {"eps": "auto"}})
    assert load(file=file).selcon.clustering.eps == "auto"
    assert load("selcon.clustering.eps", "0.4", file=file).selcon.clustering.eps == 0.4


def test_config_of_torchreids_own_script_is_read_as_it_is(tmp_path):
    file = written(
        tmp_path,
        model={"name": "osnet_ain_x1_0", "pretrained": False},
        data={"type": "image", "sources": ["market1501"], "combineall": True},
        loss={"name": "softmax", "softmax": {"label_smooth": True}},
        train={"optim": "amsgrad", "lr": 0.0015, "fixbase_epoch": 10},
        test={"ranks": [1], "visrank": False},
    )
    cfg = load(file=file)
    assert (cfg.model.name, cfg.train.lr) == ("osnet_ain_x1_0", 0.0015)
    assert cfg.selcon.method == "SelectiveContrastive"
    assert cfg.is_frozen()


def test_folder_and_pattern_are_taken_as_they_are():
    cfg = load(images="2024", camera_pattern="[12]")
    assert cfg.image_folder.root == "2024"
    assert cfg.image_folder.camera_pattern == "[12]"
    assert cfg.data.sources == ["imagefolderreid"]
    assert cfg.data.targets == []


@pytest.mark.parametrize("name", FILES)
def test_host_is_told_by_the_keys(name):
    expected = "torchreid" if name.startswith("torchreid") else "fastreid"
    assert host_of(builtin_config(name)) == expected


def test_host_of_other_files(tmp_path):
    assert host_of("") == "fastreid"
    file = tmp_path / "broken.yml"
    file.write_text("model: [")
    with pytest.raises(ValueError, match=r"broken\.yml, line 1: this is not YAML"):
        host_of(str(file))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("torchreid")])
def test_configs_of_the_package_are_complete(name):
    cfg = load_config(builtin_config(name))  # the host is told by the keys
    assert cfg.data.save_dir == f"logs/torchreid/{Path(name).stem}"
    assert cfg.train.batch_size % cfg.sampler.num_instances == 0


def test_former_keys_in_a_file_its_base_and_the_command_line(tmp_path):
    written(tmp_path, selcon={"outlier_ratio": 0.5, "max_bad_share": 0.25})
    (tmp_path / "config.yml").rename(tmp_path / "base.yml")
    file = tmp_path / "run.yml"
    file.write_text(
        "_BASE_: base.yml\nselcon:\n  outlier_share: 0.25\n  keep_best_by: outlier_share\n"
    )
    node = load("selcon.max_bad_steps", "3", file=str(file)).selcon
    assert node.outlier_ratio == 0.25
    assert node.max_unreadable_ratio == 0.25
    assert node.max_nonfinite_steps == 3
    assert node.keep_best_by == "outlier_ratio"
    assert not {"outlier_share", "max_bad_share", "max_bad_steps"} & node.keys()


def test_both_names_in_one_place_are_refused(tmp_path):
    file = written(tmp_path, selcon={"image_share": 0.5, "image_weight": 0.5})
    with pytest.raises(ValueError, match=r"selcon\.image_share and selcon\.image_weight"):
        load(file=file)


def test_engine_takes_former_names():
    options = EngineOptions.of_arguments("O2CAP", None, {"image_share": 0.5, "seed": 2})
    assert options.method["image_weight"] == 0.5
    assert options.run == RunOptions(method="O2CAP", seed=2)
    with pytest.raises(ValueError, match=r"on_bad_numbers and on_nonfinite"):
        EngineOptions.of_arguments(
            "O2CAP", None, {"on_bad_numbers": "skip", "on_nonfinite": "skip"}
        )


def test_keys_of_supervised_training_are_listed():
    cfg = get_default_config()
    assert keys_without_effect(complete_config(cfg)) == []
    cfg.loss.name, cfg.sampler.train_sampler = "triplet", "RandomIdentitySampler"
    cfg.data.load_train_targets = True
    found = keys_without_effect(complete_config(cfg))
    assert set(found) == {"data.load_train_targets", "sampler.train_sampler", "loss.name"}

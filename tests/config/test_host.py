"""One interface for all hosts: the two, and a third that is one file and one line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import selcon_plugin
from selcon_plugin import hosts
from selcon_plugin.cli.main import main
from selcon_plugin.config.checks import flatten_config, value_of
from selcon_plugin.config.host_data import (
    Adaptation,
    NetworkSettings,
    Processes,
    keys_in,
)
from selcon_plugin.hosts import (
    HOSTS,
    HostEntry,
    find_network,
    get_host,
    host_of,
    host_of_keys,
    host_of_settings,
    load_config,
)
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.workflows.adapt import AdaptSettings, adapt
from selcon_plugin.workflows.bench import plan
from selcon_plugin.workflows.train import launch, train

INSTALLED = [name for name in HOSTS if importlib.util.find_spec(name)]
TOY_CLUSTERS = {"eps": 0.6, "min_samples": 2, "k1": 6, "k2": 2}
RUN = {"epochs": 3, "batch_size": 8, "learning_rate": 0.5, "num_workers": 0}


@pytest.fixture(params=INSTALLED)
def host(request):
    return get_host(request.param)


@pytest.fixture
def toy(monkeypatch):
    """Register a third host by a line in the table."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(HOSTS, "toy", HostEntry("toy_host:ToyHost", keys_in(str.title)))
    return get_host("toy")


@pytest.fixture
def crops(tmp_path):
    """Four persons of four images each, in noisy colors of their own."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "crops"
    folder.mkdir()
    for person, color in enumerate(
        [(230, 20, 20), (20, 230, 20), (20, 20, 230), (9, 9, 9)]
    ):
        for number in range(4):
            pixels = np.array(color) + rng.integers(-8, 8, size=(8, 4, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / f"{person}_{number}.png")
    return folder


# --- the hosts there are ------------------------------------------------------------------


def test_the_table_imports_no_host():
    code = (
        "import sys; from selcon_plugin.hosts import host_of_keys, find_config; "
        "assert host_of_keys(['train.lr']) == 'torchreid'; "
        "assert not {'fastreid', 'torchreid'} & set(sys.modules)"
    )
    root = str(Path(selcon_plugin.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": root})


def test_names_agree(host):
    assert get_host(host.name) is host
    entry = HOSTS[host.name]
    for name in INSTALLED:
        keys = list(flatten_config(get_host(name).default_config()))
        assert host.owns(keys) == entry.owns(keys) == (name == host.name)
    assert not host.owns([])
    assert host.help().keys is host.keys
    defaults = flatten_config(host.default_config())
    assert set(vars(host.run_keys).values()) <= set(defaults)


def test_unknown_and_missing_hosts(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="host 'mmreid' is unknown"):
        get_host("mmreid")
    gone = HostEntry("package_that_is_gone.host:Host", keys_in(str.title))
    monkeypatch.setitem(HOSTS, "gone", gone)
    assert host_of_keys(["Selcon"]) == "gone"
    assert host_of_settings({"Selcon.Method": "CAP"}) is None
    with pytest.raises(ImportError):
        get_host("gone")
    assert host_of_keys(["mIxEd"]) == hosts.DEFAULT_HOST
    assert host_of("") == hosts.DEFAULT_HOST


def test_neutral_settings_reach_the_config(host, tmp_path):
    overrides = host.overrides(
        **RUN,
        output="2024",  # a text, not a number
        seed=7,
        options={"method": "ClusterContrast", "temperature": 0.25},
        clustering={"threshold": 0.7, "k1": 12},
        network=NetworkSettings("osnet_x0_25", pretrained=False, input_size=(64, 32)),
        device="cpu",
    )
    cfg = host.load_config(overrides=overrides, images="2025", camera_pattern="[12]")
    assert cfg.is_frozen()
    flat = flatten_config(cfg)
    for name, value in {**RUN, "output": "2024"}.items():
        found = flat[getattr(host.run_keys, name)]
        assert found == value, name
        assert type(found) is type(value), name
    path, case = host.keys.path, host.keys.case
    node = {"seed": 7, "method": "ClusterContrast", "temperature": 0.25}
    node |= {"clustering.threshold": 0.7, "clustering.k1": 12}
    for name, value in node.items():
        assert flat[f"{path}.{case(name)}"] == value
    assert set(overrides) <= set(flat)
    assert "2025" in flat.values()
    assert "osnet_x0_25" in flat.values()


def test_options_come_after_the_overrides(host):
    key = host.run_keys.epochs
    cfg = host.load_config("", [key, "5"], overrides=host.overrides(epochs=3))
    assert flatten_config(cfg)[key] == 5
    assert host.overrides(epochs=None) == {}
    with pytest.raises(ValueError, match=f"{key}S?.*did you mean"):
        host.load_config(overrides={key + key[-1]: 5})


def test_a_run_tests_on_its_training_data_where_only_these_are_named(host, tmp_path):
    data, tests = host.run_keys.training_data, host.run_keys.test_data
    names = {"fastreid": "DukeMTMC", "torchreid": "dukemtmcreid"}
    name, other = names[host.name], {"fastreid": "MSMT17", "torchreid": "msmt17"}[host.name]
    default = value_of(host.load_config(options=_on_cpu(host)), tests)
    assert "market1501" in str(default).lower()

    def tested(options=(), file="", **how):
        return value_of(host.load_config(file, [*options, *_on_cpu(host)], **how), tests)

    trained = (data, f"['{name}']")
    assert list(tested(trained)) == [name]
    assert list(tested(overrides={data: [name]})) == [name]
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(nested({data: [name]})))
    assert list(tested(file=str(file))) == [name]
    # Whatever is named stays.
    assert list(tested((*trained, tests, f"['{other}']"))) == [other]
    assert list(tested((*trained, tests, "[]"))) == []
    file.write_text(yaml.safe_dump(nested({tests: [other]})))
    assert list(tested(trained, file=str(file))) == [other]


def nested(values):
    ((key, value),) = values.items()
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def test_one_data_set_for_all_is_named_as_the_host_does(host):
    found = host.overrides(dataset="Market1501")
    expected = {
        "fastreid": {
            "DATASETS.NAMES": ("Market1501",),
            "DATASETS.TESTS": ("Market1501",),
            "TEST.PRECISE_BN.DATASET": "",
        },
        "torchreid": {"data.sources": ["market1501"], "data.targets": ["market1501"]},
    }
    assert found == expected[host.name]
    cfg = host.load_config(overrides=found, options=_on_cpu(host))
    if host.name == "fastreid":
        with pytest.raises(ValueError, match="trains on identities"):
            host.check_trainable(cfg)
    else:
        host.check_trainable(cfg)


def _on_cpu(host):
    return [str(word) for pair in host.overrides(device="cpu").items() for word in pair]


def test_checkpoints_are_listed_by_epochs(host, tmp_path):
    files = {
        "fastreid": {1: "model_0000.pth", 2: "model_0001.pth", 3: "model_final.pth"},
        "torchreid": {n: f"model/model.pth.tar-{n}" for n in (2, 10)},
    }[host.name]
    assert host.checkpoints(tmp_path, 3) == []
    (tmp_path / "model").mkdir()
    for name in [*files.values(), "other.pth", "model/other", "model_best.pth"]:
        (tmp_path / name).touch()
    listed = host.checkpoints(tmp_path, 3)
    assert listed == [(epochs, tmp_path / name) for epochs, name in files.items()]


def test_network_is_written_without_what_its_method_remembers(host, tmp_path):
    state = {"module.backbone.w": torch.ones(2), "method.bank": torch.zeros(3)}
    torch.save({host.checkpoint_key: state, "optimizer": {}}, tmp_path / "run.pth")
    host.write_network(tmp_path / "run.pth", tmp_path / "network.pth")
    written = torch.load(tmp_path / "network.pth", weights_only=True)
    assert written.keys() == {host.checkpoint_key}
    assert written[host.checkpoint_key].keys() == {"backbone.w"}


def test_adaptation_is_a_legal_config(host, tmp_path):
    adaptation = Adaptation(
        str(tmp_path / "w.pth"),
        "SelConCluster",
        str(tmp_path / "run"),
        epochs=4,
        learning_rate=1e-4,
        batch_size=16,
        num_workers=0,
        checkpoint_period=2,
        device="cpu",
    )
    cfg = host.load_config(overrides=host.adaptation_overrides(adaptation))
    flat, keys = flatten_config(cfg), host.run_keys
    assert flat[keys.weights] == adaptation.weights
    assert (flat[keys.epochs], flat[keys.learning_rate]) == (4, 1e-4)


def test_a_config_with_a_base_belongs_to_the_host_of_its_keys(tmp_path):
    (tmp_path / "lower.yml").write_text("train: {lr: 0.1}\n")
    (tmp_path / "upper.yml").write_text("SOLVER: {BASE_LR: 0.1}\n")
    for name, host in (("lower", "torchreid"), ("upper", "fastreid")):
        own = "train" if name == "lower" else "SOLVER"
        only_base, both = tmp_path / f"{name}_base.yml", tmp_path / f"{name}_both.yml"
        only_base.write_text(f"_BASE_: {name}.yml\n")
        both.write_text(f"_BASE_: {name}.yml\n{own}: {{}}\n")
        assert host_of(str(only_base)) == host_of(str(both)) == host


def test_several_processes_are_refused_where_there_is_one(toy):
    with pytest.raises(ValueError, match="Toy trains in one process: remove --num-gpus"):
        launch(toy, toy.load_config(), Processes(per_machine=2))
    if "torchreid" in INSTALLED:
        with pytest.raises(ValueError, match=r"torchreid trains in one.*CUDA_VIS"):
            get_host("torchreid").launch(print, (), Processes(num_machines=2))


# --- a third ------------------------------------------------------------------------------


@pytest.fixture
def toy_run(toy, crops, tmp_path):
    """A run of it, from ``fit``."""
    return selcon_plugin.fit(
        crops,
        tmp_path / "run",
        host="toy",
        method="ClusterContrast",
        epochs=2,
        clustering=TOY_CLUSTERS,
    )


def test_a_third_host_trains_by_every_way_in(toy, crops, tmp_path, toy_run):
    assert toy_run.record["host"] == "toy"
    assert toy_run.record["num_clusters"] > 1
    page = (toy_run.folder / "report.html").read_text()
    assert "ClusterContrast in toy" in page
    assert "Run.Epochs" in page

    # From its config the command tells whose it is.
    config = toy_run.folder / "config.yaml"
    assert host_of(str(config)) == "toy"
    out = ["Run.Folder", str(tmp_path / "again")]
    assert main(["train", "--config-file", str(config), *out]) == 0
    again = torch.load(tmp_path / "again" / "model_2.pth", weights_only=True)
    once = torch.load(toy_run.weights, weights_only=True)
    assert torch.equal(again["model"]["linear.weight"], once["model"]["linear.weight"])
    assert (tmp_path / "again" / "report.html").is_file()
    assert main(["report", str(tmp_path / "again"), str(toy_run.folder),
                 "--output", str(tmp_path / "c.html")]) == 0  # fmt: skip


def test_a_third_host_is_found_by_the_embedder_and_adapted(toy, crops, tmp_path, toy_run):
    (tmp_path / "run" / "config.yaml").rename(tmp_path / "toy.yaml")
    config = str(tmp_path / "toy.yaml")
    network = find_network(toy_run.weights, config)
    assert network.host is toy
    embedder = Embedder.from_checkpoint(toy_run.weights, config_file=config, device="cpu")
    assert embedder.embed_folder(crops).features.shape == (16, 4)
    settings = AdaptSettings(
        str(toy_run.weights), str(crops), config_file=config, epochs=2, device="cpu"
    )
    result = adapt(settings, tmp_path / "adapted")
    assert [candidate.epochs for candidate in result.candidates] == [0, 1, 2]
    loaded = Embedder.from_checkpoint(result.file, device="cpu")
    assert loaded.embed_folder(crops).features.shape == (16, 4)


def test_a_third_host_is_planned_by_the_bench(toy, crops, tmp_path, toy_run):
    content = yaml.safe_load((toy_run.folder / "config.yaml").read_text())
    file = tmp_path / "toy.yml"
    file.write_text(yaml.safe_dump(content))
    runs = plan([str(file)], tmp_path / "bench", seeds=2, epochs=3)
    assert [(run.host, run.seed) for run in runs] == [("toy", 0), ("toy", 1)]
    for run in runs:
        settings = yaml.safe_load((run.folder / "bench.yaml").read_text())
        assert settings["Run"]["Epochs"] == 3
        assert settings["Run"]["Folder"] == str(run.folder)
        assert settings["Selcon"]["Seed"] == run.seed
    with pytest.raises(ValueError, match=r"Run\.Folder is set by --output"):
        plan([str(file)], tmp_path / "bench", seeds=1, options=["Run.Folder", "x"])
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR is a key of another host"):
        plan([str(file)], tmp_path / "bench", seeds=1, options=["SOLVER.BASE_LR", "1"])


def test_a_third_host_has_help_and_no_demo(toy, capsys):
    assert main(["config", "--explain", "Selcon.Temperature"]) == 0
    assert capsys.readouterr().out.startswith("Selcon.Temperature\n")
    with pytest.raises(ValueError, match="there is no demo in Toy"):
        toy.demo(toy.load_config())
    with pytest.raises(ValueError, match="--weights FILE"):
        toy.extract(toy.load_config(), "f.npz")
    with pytest.raises(ValueError, match="Toy loads no weights without a config"):
        toy.inference_overrides("osnet_x0_25")


def test_an_evaluation_only_run_leaves_no_report(toy, tmp_path, monkeypatch):
    from selcon_plugin.config.host_data import RunResult

    seen = []
    monkeypatch.setattr(
        "selcon_plugin.workflows.train.finish_run", lambda *a: seen.append(a)
    )
    result = RunResult(tmp_path, tmp_path / "w.pth", trained=False)
    monkeypatch.setattr(type(toy), "train", lambda *_, **__: result)
    assert train(toy, toy.load_config()) is result
    assert seen == []


def test_load_config_by_name(toy):
    cfg = load_config("", ["Run.Epochs", "4"], host="toy")
    assert json.loads(json.dumps(cfg.Run.Epochs)) == 4

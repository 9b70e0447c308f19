"""``selcon train --host torchreid``: a config in, a trained and evaluated model out."""

import json

import pytest
import torch
import yaml
from PIL import Image

from selcon_plugin.cli.main import main
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.hosts import host_of_settings, load_config
from selcon_plugin.options import Option
from selcon_plugin.report import collect_run
from selcon_plugin.report.page import changed_settings
from selcon_plugin.torchreid_ext import ImageSelConEngine, register_synthetic_persons
from selcon_plugin.torchreid_ext.train import build_datamanager, build_engine

SPEC = {
    "num_train_ids": 8,
    "num_test_ids": 4,
    "images_per_id": 5,
    "num_cameras": 3,
    "num_distractors": 3,
}
CONFIG = {
    "use_gpu": False,
    "model": {"name": "timm:test_resnet", "pretrained": False},
    "data": {
        "sources": ["syntheticpersons"],
        "targets": ["syntheticpersons"],
        "height": 64,
        "width": 32,
        "workers": 0,
    },
    "train": {"optim": "sgd", "lr": 0.02, "max_epoch": 2, "batch_size": 8},
    "test": {"batch_size": 16},
    "synthetic_persons": SPEC,
    "selcon": {
        "num_parts": 2,
        "num_neighbors": 3,
        "num_negatives": 20,
        "warmup_epochs": 1,
        "iters_per_epoch": 2,
    },
}


@pytest.fixture
def config(tmp_path, data_root):
    file = tmp_path / "tiny.yml"
    nodes = {**CONFIG, "data": {**CONFIG["data"], "root": str(data_root)}}
    file.write_text(yaml.safe_dump(nodes))
    return str(file)


@pytest.fixture
def selcon(config):
    """Run the command with the tiny config; further values may follow."""

    def run(*arguments, **values):
        options = [word for key, value in values.items() for word in (key, str(value))]
        command = ["train", "--host", "torchreid", "--config-file", config]
        return main([*command, *arguments, *options])

    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def checkpoint_of(folder, epoch):
    return torch.load(folder / "model" / f"model.pth.tar-{epoch}", weights_only=True)


def die_in_epoch(number, monkeypatch):
    """Let training end as if the process were killed."""
    train = ImageSelConEngine.train

    def train_or_die(engine, *args, **kwargs):
        if engine.epoch == number:
            raise KeyboardInterrupt
        train(engine, *args, **kwargs)

    monkeypatch.setattr(ImageSelConEngine, "train", train_or_die)


def test_run_leaves_its_results(selcon, tmp_path):
    assert selcon(**{"data.save_dir": tmp_path / "out", "selcon.seed": 3}) == 0
    record = results_of(tmp_path / "out")
    assert record["host"] == "torchreid"
    assert (record["method"], record["seed"]) == ("SelectiveContrastive", 3)
    assert (record["epochs"], record["steps"], record["num_images"]) == (2, 4, 40)
    assert record["metrics"].keys() == {"syntheticpersons"}
    metrics = record["metrics"]["syntheticpersons"]
    assert metrics.keys() == {"mAP", "Rank-1", "Rank-5", "Rank-10"}
    assert all(0 < value <= 100 for value in metrics.values())
    assert record["train_seconds"] > 0
    assert record["num_clusters"] is None
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"].endswith("1 thread")


def test_run_checks_each_key_once(selcon, tmp_path, monkeypatch):
    checks = []
    check = Option.check

    def counted(self, value, *, label=None):
        checks.append(label or self.name)
        return check(self, value, label=label)

    monkeypatch.setattr(Option, "check", counted)
    values = {"data.save_dir": tmp_path / "out", "selcon.selection": "cluster"}
    assert selcon(**values) == 0
    assert "selcon.clustering.period" in checks
    assert not {name for name in checks if checks.count(name) > 1}


def test_run_leaves_a_report(selcon, tmp_path, capsys):
    assert selcon(**{"data.save_dir": tmp_path / "out", "selcon.seed": 4}) == 0
    run = collect_run(tmp_path / "out", find_host=host_of_settings)
    assert run.host == "torchreid"
    assert run.curve("total_loss").epochs == (1.0, 2.0)
    assert run.curve("mAP").epochs == (2.0,)
    assert run.embedding.epoch == 2
    assert [len(queries) for queries in run.ranked.values()] == [8]
    assert changed_settings(run)["selcon.seed"] == (4, 0)
    assert "selcon.temperature" not in changed_settings(run)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "same person" in page
    assert "data:image" in page
    (tmp_path / "out" / "report.html").unlink()
    assert main(["report", str(tmp_path / "out"), "--no-images"]) == 0
    assert "report.html" in capsys.readouterr().out
    again = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in again


def test_stopped_run_resumes(selcon, tmp_path, monkeypatch):
    values = {
        "selcon.method": "SelConCluster",
        "selcon.clustering.eps": 0.7,
        "selcon.clustering.min_samples": 2,
        "selcon.clustering.k1": 8,
        "selcon.clustering.k2": 3,
        "train.max_epoch": 3,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert selcon(**values, **{"data.save_dir": whole}) == 0
    values["data.save_dir"] = broken
    with monkeypatch.context() as patch:
        die_in_epoch(1, patch)
        assert selcon(**values) == 130
    assert not (broken / "results.json").exists()
    assert [file.name for file in (broken / "model").iterdir()] == ["model.pth.tar-1"]
    assert selcon("--resume", **values) == 0
    expected, got = (checkpoint_of(folder, 3)["state_dict"] for folder in (whole, broken))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    unbroken, resumed = results_of(whole), results_of(broken)
    assert resumed["metrics"] == unbroken["metrics"]
    assert resumed["num_clusters"] == unbroken["num_clusters"] > 1
    before = checkpoint_of(broken, 1)["selcon"]["meter"]["seconds"]
    assert resumed["train_seconds"] > before > 0


def test_resume_without_a_checkpoint_begins(selcon, tmp_path, caplog):
    caplog.set_level("INFO")
    assert selcon("--resume", **{"data.save_dir": tmp_path / "out"}) == 0
    assert "the training starts over" in caplog.text
    assert results_of(tmp_path / "out")["steps"] == 4


def test_resume_of_a_complete_run_evaluates_it_again(selcon, tmp_path):
    out = tmp_path / "out"
    values = {"data.save_dir": out, "selcon.ema_decay": 0.9}
    assert selcon(**values) == 0
    first = results_of(out)
    (out / "results.json").unlink()
    assert selcon("--resume", **values) == 0
    again = results_of(out)
    assert again["metrics"] == first["metrics"]
    assert again["train_seconds"] <= first["train_seconds"]
    assert len(list((out / "model").iterdir())) == 2


def test_named_checkpoint_is_resumed(selcon, tmp_path):
    whole = tmp_path / "whole"
    assert selcon(**{"data.save_dir": whole}) == 0
    first = whole / "model" / "model.pth.tar-1"
    values = {"data.save_dir": tmp_path / "other", "model.resume": first}
    assert selcon(**values) == 0
    expected, got = (
        checkpoint_of(folder, 2)["state_dict"] for folder in (whole, tmp_path / "other")
    )
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("key", ["model.load_weights", "model.resume"])
def test_evaluation_repeats_the_result_of_the_training(
    selcon, tmp_path, capsys, key, monkeypatch
):
    out = tmp_path / "out"
    options = {"selcon.ema_decay": 0.9, "selcon.global_distance_weight": 0.3}
    assert selcon(**options, **{"data.save_dir": out}) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if "mAP: " in line]
    written = (out / "results.json").read_text()
    options[key] = out / "model" / "model.pth.tar-2"
    # Nothing is to be downloaded for a network whose weights are in the file.
    options["model.pretrained"] = True
    assert selcon("--eval-only", **options, **{"data.save_dir": out}) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "mAP: " in line] == (
        trained
    )
    assert (out / "results.json").read_text() == written


def test_eval_is_a_command_of_its_own(config, tmp_path, capsys):
    engine = build_engine(load_config(config))
    engine.save_model(0, 0.0, str(tmp_path / "out"))
    file = tmp_path / "out" / "model" / "model.pth.tar-1"
    assert main(["eval", "--config-file", config, "model.load_weights", str(file)]) == 0
    assert "Rank-1" in capsys.readouterr().out


def test_folder_of_images_trains(selcon, data_root, tmp_path):
    (folder,) = data_root.rglob("bounding_box_train")
    out = tmp_path / "out"
    arguments = ("--images", str(folder), "--camera-pattern", r"_c(\d)")
    assert selcon(*arguments, **{"data.save_dir": out}) == 0
    record = results_of(out)
    assert (record["num_images"], record["metrics"]) == (40, {})
    camids = checkpoint_of(out, 2)["state_dict"]["method._bank_camids"]
    assert set(camids.tolist()) == {0, 1, 2}


def test_two_folders_are_distinguished(config, tmp_path):
    """torchreid knows a data set only by its name."""
    counts = []
    for name, count in (("one", 9), ("two", 10)):
        for number in range(count):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 16)).save(tmp_path / name / f"{number}.jpg")
        cfg = load_config(config, host="torchreid", images=str(tmp_path / name))
        counts.append(len(build_datamanager(cfg).train_loader.dataset))
    assert counts == [9, 10]


def test_several_test_sets_keep_their_names(selcon, data_root, tmp_path):
    values = {
        "data.save_dir": tmp_path / "out",
        "data.targets": "['syntheticpersons', 'few-again']",
        "train.max_epoch": 1,
    }
    register_synthetic_persons("few-again", SyntheticPersonsSpec(**SPEC))
    assert selcon(**values) == 0
    metrics = results_of(tmp_path / "out")["metrics"]
    assert metrics["few-again"] == metrics["syntheticpersons"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train.optim": "amsgrad", "train.lr": 0.001}, {"amsgrad": True, "lr": 0.001}),
        ({"sgd.nesterov": True, "train.weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"train.staged_lr": True, "train.base_lr_mult": 0.5}, {"lr": 0.01}),
    ],
)
def test_optimizer_is_that_of_the_config(config, options, expected):
    pairs = [word for key, value in options.items() for word in (key, str(value))]
    engine = build_engine(load_config(config, pairs))
    group = engine.optimizer.param_groups[0]
    assert expected.items() <= group.items()
    if "train.staged_lr" in options:
        head = {id(p) for p in engine.model.heads.parameters()}
        assert {id(p) for p in engine.optimizer.param_groups[1]["params"]} == head
        assert engine.optimizer.param_groups[1]["lr"] == 0.02


def test_keys_of_the_config_reach_model_and_engine(config):
    pairs = [
        *("selcon.pool", "gem", "selcon.bn_neck", "True", "selcon.embedding_dim", "32"),
        *("selcon.method", "SelConCluster", "selcon.warmup_epochs", "0"),
        *("selcon.num_parts", "4", "selcon.temperature", "0.2"),
        *("selcon.micro_batches", "2", "selcon.clustering.period", "3"),
        *("sampler.num_instances", "2", "selcon.clustering.eps", "auto"),
    ]
    engine = build_engine(load_config(config, pairs))
    head = engine.model.heads
    assert type(head.pool).__name__ == "GeneralizedMeanPool"
    assert head.global_norm.bias is None
    assert (head.global_dim, head.num_parts) == (32, 4)
    assert engine._method_options["temperature"] == 0.2
    assert engine._options.micro_batches == 2
    training = engine._training
    assert (training.clustering.period, training.min_clusters) == (3, 4)
    assert training.labeler.eps == "auto"


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--num-gpus", "2"], ["one process", "remove --num-gpus"]),
        (["--eval-only"], ["model.load_weights must name a checkpoint"]),
        (["selcon.temperature", "0.0"], ["selcon.temperature", "> 0"]),
        (["train.batch_size", "64"], ["40 training images", "(64)"]),
        (["selcon.sampler", "pk"], ["sampler pk samples from clusters"]),
        (["selcon.micro_batches", "3"], ["micro-batches (3)"]),
        (["model.name", "osnet_x25"], ["no model named 'osnet_x25'", "osnet_x0_25"]),
        (["model.load_weights", "nowhere.pth"], ["nowhere.pth"]),
        (["model.resume", "nowhere.pth"], ["model.resume", "nowhere.pth"]),
        (["data.sources", "['nothing']"], ["nothing"]),
        (["test.visrank", "True"], ["visrank"]),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    config, arguments, fragments, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config-file", config, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("selcon train: error:")
    assert all(word in error for word in fragments)


def test_weights_of_another_model_end_with_one_line(selcon, tmp_path, capsys):
    out = tmp_path / "out"
    assert selcon(**{"data.save_dir": out, "train.max_epoch": 1}) == 0
    capsys.readouterr()
    file = out / "model" / "model.pth.tar-1"
    for key, message in {
        "model.load_weights": "parts: 2 in the weights, 4 in the network",
        "model.resume": "cannot resume: selcon.num_parts was 2 and is 4",
    }.items():
        values = {key: file, "selcon.num_parts": 4, "data.save_dir": tmp_path / "other"}
        assert selcon(**values) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert message in error[0]


def test_nothing_to_evaluate_on(config, data_root, tmp_path, capsys):
    engine = build_engine(load_config(config))
    engine.save_model(0, 0.0, str(tmp_path))
    file = str(tmp_path / "model" / "model.pth.tar-1")
    command = ["eval", "--config-file", config, "model.load_weights", file]
    assert main([*command, "data.targets", "[]"]) == 2
    assert "data.targets has no test images" in capsys.readouterr().err

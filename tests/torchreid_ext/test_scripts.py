"""Scripts written for torchreid train with the engine, with the settings of its configs."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from yacs.config import CfgNode

from helpers.engines import (
    CLUSTERING,
    NETWORK,
    checkpoints_in,
    network_of,
    run,
)
from selcon_plugin.cli.run import main as run_command
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.models.torchreid import factory_name
from selcon_plugin.torchreid_ext import (
    ImageSelConEngine,
    build_selcon_model,
)
from selcon_plugin.torchreid_ext.evaluation import EvaluationEngine, EvaluationScope

torchreid = import_torchreid()

# The settings in which torchreid's nine configs differ. All of them use amsgrad and train
# only the open layers first, with label smoothing.
_STEP, _COSINE = (
    {"lr_scheduler": "single_step", "stepsize": [60]},
    {"lr_scheduler": "cosine"},
)
CONFIGS = {
    "osnet_ain_x1_0_cosine": ("osnet_ain_x1_0", 0.0015, _COSINE, ["classifier"], "cosine"),
    "osnet_ibn_x1_0": ("osnet_ibn_x1_0", 0.0015, _STEP, ["classifier"], "euclidean"),
    "osnet_x0_25": ("osnet_x0_25", 0.003, _STEP, ["classifier"], "euclidean"),
    "osnet_x0_5": ("osnet_x0_5", 0.003, _STEP, ["classifier"], "euclidean"),
    "osnet_x0_75": ("osnet_x0_75", 0.0015, _STEP, ["classifier"], "euclidean"),
    "osnet_x1_0": ("osnet_x1_0", 0.0015, _STEP, ["classifier"], "euclidean"),
    "osnet_x1_0_cosine": ("osnet_x1_0", 0.0015, _COSINE, ["classifier"], "euclidean"),
    "r50": ("resnet50_fc512", 0.0003, _STEP, ["classifier"], "euclidean"),
    "r50fc512": ("resnet50_fc512", 0.0003, _STEP, ["fc", "classifier"], "euclidean"),
}


class PlainOutput:
    """An output with only ``write`` and ``flush``, as torchreid's ``Logger``."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def train_by_script(data, folder, name, lr, schedule, open_layers, metric, **engine):
    """Train as torchreid's train script does, with our engine in place of its own."""
    model = torchreid.models.build_model(
        name, num_classes=data.num_train_pids, loss="softmax", pretrained=False
    )
    torchreid.utils.compute_model_complexity(model, (1, 3, 64, 32))
    optimizer = torchreid.optim.build_optimizer(
        model, optim="amsgrad", lr=lr, new_layers=["classifier"]
    )
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, max_epoch=2, **schedule)
    made = ImageSelConEngine(
        data,
        model,
        optimizer=optimizer,
        scheduler=scheduler,
        use_gpu=False,
        label_smooth=True,
        iters_per_epoch=1,
        **engine,
    )
    made.run(
        save_dir=str(folder),
        max_epoch=2,
        start_epoch=0,
        fixbase_epoch=1,
        open_layers=open_layers,
        start_eval=0,
        eval_freq=-1,
        test_only=False,
        print_freq=20,
        dist_metric=metric,
        normalize_feature=False,
        visrank=False,
        visrank_topk=10,
        use_metric_cuhk03=False,
        ranks=[1, 5, 10, 20],
        rerank=False,
    )
    return made


@pytest.mark.parametrize(
    "config",
    # The other one with this model takes more names of layers.
    [pytest.param(c, marks=[pytest.mark.slow] if c == "r50" else []) for c in CONFIGS],
)
def test_settings_of_torchreids_configs(manager, tmp_path, monkeypatch, caplog, config):
    caplog.set_level("INFO", "selcon_plugin")
    output = PlainOutput()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", PlainOutput())
    name, *settings = CONFIGS[config]
    data = manager(transforms=["random_flip", "color_jitter"])
    engine = train_by_script(data, tmp_path, name, *settings)
    assert engine.results["few"]["mAP"] > 0
    assert "is trained (epoch 1 of 1)" in caplog.text
    assert "mAP" in output.text
    assert checkpoints_in(tmp_path) == ["model.pth.tar-1", "model.pth.tar-2"]
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["model"]["name"] == name
    # The commands load the network of the script.
    embedder = Embedder.from_checkpoint(tmp_path / "model" / "model.pth.tar-2")
    images = [path for path, *_ in data.test_dataset["few"]["query"]]
    (batch,) = data.test_loader["few"]["query"]
    with torch.no_grad():
        expected = engine.model.eval()(batch["img"])
    assert np.abs(embedder(images) - expected.numpy()).max() < 1e-4


def test_records_of_a_script_are_those_of_its_engine(manager, tmp_path):
    options = {"method": "ClusterContrast", "clustering": CLUSTERING, "temperature": 0.07}
    train_by_script(manager(), tmp_path, *CONFIGS["osnet_x0_25"], **options)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["train"]["optim"] == "amsgrad"
    assert written["train"]["stepsize"] == [60]
    assert written["train"]["lr"] == 0.003
    assert written["test"]["dist_metric"] == "euclidean"
    assert written["selcon"]["method"] == "ClusterContrast"
    assert written["selcon"]["temperature"] == 0.07
    found = {key: written["selcon"]["clustering"][key] for key in CLUSTERING}
    assert found == CLUSTERING
    assert (tmp_path / "results.json").is_file()


def test_model_that_torchreid_does_not_build_is_reported(manager, tmp_path, caplog):
    model = torchreid.models.build_model("osnet_x0_25", 8, pretrained=False)
    model.conv3[0] = nn.Sequential(model.conv3[0], nn.BatchNorm2d(96))
    optimizer = torchreid.optim.build_optimizer(model)
    engine = ImageSelConEngine(
        manager(), model, optimizer, use_gpu=False, iters_per_epoch=1
    )
    run(engine, tmp_path, 1)
    assert "--config-file" in caplog.text
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("loss", ["softmax", "triplet"])
def test_name_of_a_model_is_found(loss):
    for name in ("osnet_ibn_x1_0", "resnet50_fc512", "mobilenetv2_x1_4"):
        model = torchreid.models.build_model(name, 7, loss=loss, pretrained=False)
        state = torch.get_rng_state()
        assert factory_name(model) == name
        assert torch.equal(torch.get_rng_state(), state)
    assert factory_name(nn.Linear(2, 2)) == ""


SCRIPT = """
import sys
import torchreid
from yacs.config import CfgNode

def option(sign):
    return sys.argv[sys.argv.index(sign) + 1]

cfg = CfgNode({{"train": {{"lr": 0.1}}, "loss": {{"name": "softmax"}}}})
cfg.merge_from_file(option("--config-file"))
cfg.merge_from_list(sys.argv[sys.argv.index("--") + 1:])
reid = getattr(torchreid, "reid", torchreid)
data = reid.data.ImageDataManager(
    root=option("--root"), sources="few", height=64, width=32, batch_size_train=8,
    batch_size_test=16, workers=0, use_gpu=False)
model = reid.models.build_model("osnet_x0_25", data.num_train_pids, pretrained=False)
optimizer = reid.optim.build_optimizer(model, lr=cfg.train.lr)
scheduler = reid.optim.build_lr_scheduler(optimizer)
engine = reid.engine.{engine}(data, model, optimizer, {arguments}label_smooth=True)
engine.run(save_dir=option("--out"), max_epoch=1, fixbase_epoch=1, open_layers="classifier")
"""
# The same for a trained network, as torchreid's script does it before it builds the engine.
LOAD = """
from {utils} import load_pretrained_weights, resume_from_checkpoint
start_epoch = 0
if "load" == option("--way"):
    load_pretrained_weights(model, option("--weights"))
else:
    start_epoch = resume_from_checkpoint(option("--weights"), model, optimizer, scheduler)
"""
RUN = """
engine.run(save_dir=option("--out"), max_epoch=2, start_epoch=start_epoch,
           test_only="load" == option("--way"))
if "load" == option("--way"):
    import json, pathlib
    pathlib.Path(option("--out") + ".json").write_text(json.dumps(engine.results))
"""


@pytest.fixture
def selcon_run(tmp_path, data_root, monkeypatch):
    """Run a script with ``selcon run``, and undo afterwards what that changes."""
    for name in ("merge_from_list", "merge_from_other_cfg"):
        monkeypatch.setattr(CfgNode, name, getattr(CfgNode, name))
    changed = ("Engine", "load_pretrained_weights", "resume_from_checkpoint")
    for module in [m for n, m in sys.modules.items() if n.startswith("torchreid")]:
        for name in [n for n in vars(module) if n.endswith(changed)]:
            monkeypatch.setattr(module, name, getattr(module, name))

    def run_script(text, *arguments, before=()):
        file = tmp_path / "main.py"
        file.write_text(text)
        config = tmp_path / "config.yaml"
        config.write_text("train: {lr: 0.01}\nselcon: {iters_per_epoch: 1, num_parts: 2}\n")
        words = ("--config-file", config, "--root", data_root, "--out", tmp_path / "out")
        words += tuple(before)
        return run_command([str(w) for w in (file, *words, "--", *arguments)])

    return run_script


@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        ("ImageSoftmaxEngine", "scheduler=scheduler, use_gpu=False, "),
        (
            "ImageTripletEngine",
            "margin=0.3, weight_x=0.0, scheduler=scheduler, use_gpu=False, ",
        ),
    ],
)
def test_unedited_script_trains_without_identities(selcon_run, tmp_path, engine, arguments):
    text = SCRIPT.format(engine=engine, arguments=arguments)
    assert selcon_run(text, "train.lr", "0.02", "selcon.temperature", "0.2") == 0
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["train"]["lr"] == 0.02
    assert written["selcon"]["method"] == "SelectiveContrastive"
    assert written["selcon"]["temperature"] == 0.2
    assert written["selcon"]["num_parts"] == 2
    assert checkpoints_in(tmp_path / "out") == ["model.pth.tar-1"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["selcon.temprature", "1"], "did you mean temperature"),
        (["selcon.method", "ClusterContrst"], "ClusterContrast"),
        (["selcon.clustering.epps", "1"], "epps"),
        (["train.lrr", "1"], "train.lrr"),
    ],
)
def test_wrong_key_of_an_unedited_script(selcon_run, words, named):
    text = SCRIPT.format(
        engine="ImageSoftmaxEngine", arguments="scheduler=scheduler, use_gpu=False, "
    )
    with pytest.raises((ValueError, KeyError, AssertionError), match=named):
        selcon_run(text, *words)


@pytest.mark.parametrize("way", ["load", "resume"])
def test_unedited_script_loads_its_own_checkpoint(selcon_run, tmp_path, way):
    text = SCRIPT.format(
        engine="ImageSoftmaxEngine", arguments="scheduler=scheduler, use_gpu=False, "
    )
    assert selcon_run(text) == 0
    out = tmp_path / "out"
    trained = json.loads((out / "results.json").read_text())["metrics"]
    head, _, run = text.partition("engine = ")
    load = LOAD.format(utils=f"{torchreid.__name__}.utils")
    text = head + load + "engine = " + run.partition("engine.run(")[0] + RUN
    weights = ("--way", way, "--weights", out / "model" / "model.pth.tar-1")
    assert selcon_run(text, before=weights) == 0
    if way == "load":
        found = json.loads((tmp_path / "out.json").read_text())
        assert found["few"] == pytest.approx(trained["few"])
    else:
        assert checkpoints_in(out) == ["model.pth.tar-1", "model.pth.tar-2"]


def test_script_for_videos_is_refused(selcon_run):
    text = SCRIPT.format(engine="VideoSoftmaxEngine", arguments="")
    with pytest.raises(ValueError, match="video"):
        selcon_run(text)


# --- layers -------------------------------------------------------------------------------


def moved(engine, before):
    network = network_of(engine)
    return {n for n, p in network.named_parameters() if not torch.equal(before[n], p)}


def prepared(make_engine, **options):
    engine = make_engine(iters_per_epoch=2, **options)
    engine._prepare_network()  # calibrates the head
    network = network_of(engine)
    return engine, {n: p.detach().clone() for n, p in network.named_parameters()}


@pytest.mark.parametrize(
    "layers", ["classifier", ["classifier"], ["heads"], ["fc", "heads"]]
)
def test_layers_behind_the_map_are_the_head(make_engine, tmp_path, layers):
    engine, before = prepared(make_engine)
    run(engine, tmp_path, 1, fixbase_epoch=1, open_layers=layers)
    found = moved(engine, before)
    assert found
    assert all(name.startswith("heads.") for name in found)


def test_layer_of_the_backbone(make_engine, tmp_path):
    engine, before = prepared(make_engine)
    run(engine, tmp_path, 1, fixbase_epoch=1, open_layers=["layer4", "classifier"])
    found = moved(engine, before)
    assert any(name.startswith("heads.") for name in found)
    parts = {name.split(".")[2] for name in found if name.startswith("backbone.model.")}
    assert parts == {"layer4"}


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (["clasifier"], "'classifier'"),
        (["layer9"], "layer4"),
        (["act1"], "weights"),
        ([], "[]"),
    ],
)
def test_wrong_layers_are_refused_before_anything_is_written(
    make_engine, tmp_path, layers, named
):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="open_layers") as caught:
        run(make_engine(), folder, 1, fixbase_epoch=1, open_layers=layers)
    assert named in str(caught.value)
    assert not folder.exists()


def test_layers_do_not_matter_if_nothing_is_frozen(make_engine, tmp_path):
    run(make_engine(iters_per_epoch=1), tmp_path, 1, open_layers=["no such layer"])


def test_frozen_for_longer_than_the_run_is_reported(make_engine, tmp_path, caplog):
    engine = make_engine(iters_per_epoch=1)
    run(engine, tmp_path, 1, fixbase_epoch=3, open_layers="classifier")
    assert "fixbase_epoch 3" in caplog.text


@pytest.mark.parametrize("new_layers", ["classifier", ["layer4", "classifier"]])
def test_staged_rates_reach_the_head(manager, new_layers):
    model = build_selcon_model(NETWORK, pretrained=False, input_size=(64, 32), num_parts=2)
    optimizer = torchreid.optim.build_optimizer(
        model, lr=0.1, staged_lr=True, new_layers="no part of the model", base_lr_mult=0.01
    )
    ImageSelConEngine(manager(), model, optimizer, use_gpu=False, new_layers=new_layers)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    fast = {n for n, p in model.named_parameters() if rates[id(p)] == 0.1}
    heads = {n for n, _ in model.named_parameters() if n.startswith("heads.")}
    assert heads <= fast
    others = {name.split(".")[2] for name in fast - heads}
    assert others == ({"layer4"} if "layer4" in new_layers else set())


def test_model_returns_its_feature_map(make_engine):
    for model in (make_engine().model, make_engine(ema_decay=0.9).model):
        model.eval()
        images = torch.rand(2, 3, 64, 32)
        found = model(images, return_featuremaps=True)
        assert found.shape == (2, model.backbone.feature_dim, 4, 2)
        assert torch.equal(model.test_feature(model.heads(found)), model(images))


# --- before the training ------------------------------------------------------------------


def test_weights_are_written_before_they_are_evaluated(make_engine, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no evaluation today")

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationEngine, "_evaluate", fail)
        engine = make_engine(iters_per_epoch=1, checkpoint_period=0)
        with pytest.raises(RuntimeError, match="today"):
            run(engine, tmp_path, 2)
    assert checkpoints_in(tmp_path) == ["model.pth.tar-2"]
    again = make_engine(iters_per_epoch=1)
    again.resume(tmp_path)
    run(again, tmp_path, 2)
    weights = dict(engine.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())
    assert '"mAP"' in (tmp_path / "metrics.json").read_text()
    assert (tmp_path / "ranked.json").is_file()


def data_of(**splits):
    """Return a fake data manager's test set, as path, identity and camera."""
    items = {name: [("x.jpg", *pair) for pair in pairs] for name, pairs in splits.items()}
    return SimpleNamespace(**items).__dict__


def test_test_set_without_a_match_is_refused_before_the_training():
    lonely = data_of(query=[(1, 0), (2, 0)], gallery=[(1, 0), (2, 0), (3, 1)])
    with pytest.raises(ValueError, match=r"market.* none of its 2 queries"):
        EvaluationScope.of("market", lonely)
    with pytest.raises(ValueError, match="0 gallery images"):
        EvaluationScope.of("market", data_of(query=[(1, 0)], gallery=[]))


def test_ranks_that_every_query_has():
    split = data_of(
        query=[(1, 0), (2, 1), (9, 0)],  # the last one has no match
        gallery=[(1, 0), (1, 0), (1, 1), (2, 0), (3, 1), (9, 0), (9, 0), (9, 0), (9, 0)],
    )
    scope = EvaluationScope.of("few", split)
    assert (scope.num_queries, scope.num_matched) == (3, 2)
    assert scope.last_rank(by_person=False) == 7
    assert scope.last_rank(by_person=True) == 4


def test_queries_without_a_match_are_counted(make_engine, manager, caplog):
    data = manager()
    test_set = data.test_dataset["few"]
    lost = test_set["query"][0][1]
    gallery = [item for item in test_set["gallery"] if item[1] != lost]
    test_set["gallery"] = data.test_loader["few"]["gallery"].dataset.gallery = gallery
    data.test_loader["few"]["gallery"].dataset.data = gallery
    engine = make_engine(datamanager=data)
    engine.test(ranks=[1])
    count = sum(item[1] == lost for item in test_set["query"])
    assert (
        f"{count} of the {len(test_set['query'])} queries of few have no match"
        in caplog.text
    )
    assert 0 < engine.results["few"]["mAP"] <= 100


def test_cuhk03_metric_on_fewer_persons_than_ranks(make_engine, caplog):
    engine = make_engine()
    engine.check_run({"max_epoch": 1, "use_metric_cuhk03": True, "ranks": [1, 10]})
    assert "Rank 10 of few" in caplog.text
    engine.test(use_metric_cuhk03=True, ranks=[1, 10])
    assert set(engine.results["few"]) == {"mAP", "Rank-1"} | (
        {"Rank-5"} if engine._scopes["few"].num_persons >= 5 else set()
    )


def test_optimizer_of_another_script_is_named(make_engine, tmp_path):
    run(make_engine(iters_per_epoch=1), tmp_path, 1)
    engine = make_engine(iters_per_epoch=1)
    last = list(network_of(engine).heads.parameters())
    groups = engine.optimizer.param_groups
    groups[0]["params"] = [p for p in groups[0]["params"] if all(p is not o for o in last)]
    engine.optimizer.add_param_group({"params": last})
    with pytest.raises(ValueError, match=r"model\.pth\.tar-1 .*same script"):
        engine.resume(tmp_path)

"""The supervised reference of a bench: each host's own baseline, with identities."""

import json

import pytest
import yaml

from helpers.hosts import needs_fastreid, needs_torchreid
from helpers.tiny import FASTREID, TORCHREID
from selcon_plugin.hosts import get_host
from selcon_plugin.workflows.bench import plan
from selcon_plugin.workflows.bench_runs import _command
from selcon_plugin.workflows.supervised import main

ROWS = {
    "fastreid": {
        **FASTREID,
        "MODEL.BACKBONE.NAME": "build_torchreid_backbone",
        "MODEL.BACKBONE.TORCHREID_NAME": "osnet_x0_25",
        "SOLVER.MAX_EPOCH": 2,
        "MODEL.SELCON.ITERS_PER_EPOCH": 3,
        "TEST.EVAL_PERIOD": 2,
    },
    "torchreid": {
        **TORCHREID,
        "model.name": "osnet_x0_25",
        "train.max_epoch": 2,
        "selcon.iters_per_epoch": 3,
    },
}


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """Write a config of a tiny run in a host."""
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path / "data"))

    def write(host, **changes):
        options = ROWS[host] | changes
        if host == "torchreid":
            options |= {"data.root": tmp_path / "data"}
        words = [str(word) for pair in options.items() for word in pair]
        file = tmp_path / f"{host}.yml"
        file.write_text(get_host(host).load_config("", words).dump())
        return file

    return write


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("fastreid", marks=needs_fastreid),
        pytest.param("torchreid", marks=needs_torchreid),
    ],
)
def test_reference_has_network_and_budget_of_the_config(config_of, tmp_path, host):
    file = config_of(host)
    runs = plan([str(file)], tmp_path / "bench", seeds=1, supervised=True)
    own, reference = runs
    assert reference.config == f"supervised ({get_host(host).title})"
    assert reference.supervised
    assert not own.supervised
    assert (reference.backbone, reference.input_size) == ("osnet_x0_25", "64x32")
    assert (own.backbone, own.input_size) == ("osnet_x0_25", "64x32")
    config = reference.folder / "bench.yaml"
    assert _command(reference)[1:] == [
        "-m",
        "selcon_plugin.workflows.supervised",
        str(config),
    ]
    assert main([str(config)]) == 0
    record = json.loads((reference.folder / "results.json").read_text())
    assert (record["epochs"], record["steps"]) == (2, 6)  # as the run without identities
    assert record["num_images"] == 40
    (metrics,) = record["metrics"].values()
    assert {"mAP", "Rank-1", "Rank-5", "Rank-10"} <= set(metrics)
    assert record["host"] == host
    assert record["num_clusters"] is None
    assert yaml.safe_load(config.read_text())


@needs_torchreid
def test_model_without_a_baseline_is_refused_before_any_run(config_of, tmp_path):
    file = config_of("torchreid", **{"model.name": "timm:test_resnet"})
    with pytest.raises(ValueError, match=r"timm:test_resnet.*--supervised"):
        plan([str(file)], tmp_path / "bench", seeds=1, supervised=True)
    assert not (tmp_path / "bench").exists()


@needs_torchreid
def test_wrong_config_ends_in_one_line(tmp_path, capsys):
    file = tmp_path / "bench.yaml"
    file.write_text("train: {max_epoch: 0}\n")
    assert main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train.max_epoch" in error

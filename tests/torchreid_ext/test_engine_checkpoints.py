"""Checkpoints that ``ImageSelConEngine`` writes, and their content."""

import pytest
import torch

from helpers.engines import checkpoints_in, network_of, run


def test_checkpoint_is_read_without_running_code_and_holds_everything(
    make_engine, tmp_path
):
    options = {"method": "SelConCluster", "ema_decay": 0.5, "iters_per_epoch": 2}
    engine = run(make_engine(**options), tmp_path, 1)
    file = tmp_path / "model" / "model.pth.tar-1"
    checkpoint = torch.load(file, weights_only=True)
    assert {"state_dict", "epoch", "rank1", "optimizer", "scheduler"} <= checkpoint.keys()
    assert checkpoint["epoch"] == 1
    assert 100 * checkpoint["rank1"] == pytest.approx(engine.results["few"]["Rank-1"])
    state = checkpoint["state_dict"]
    method = network_of(engine).method
    assert torch.equal(state["method.labels"], method.labels)
    assert method.labels.max() > 0
    banks = [name for name in state if name.startswith("method.") and "bank" in name]
    assert any(state[name].any() for name in banks)
    assert any(name.startswith("teacher.module.backbone.") for name in state)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"checkpoint_period": 2}, [2, 4, 5]),
        ({"checkpoint_period": 0}, [5]),
        ({"keep_checkpoints": 2}, [4, 5]),
        ({"keep_checkpoints": 2, "checkpoint_period": 2}, [4, 5]),
    ],
)
def test_which_checkpoints_there_are(make_engine, tmp_path, options, epochs):
    run(make_engine(iters_per_epoch=1, **options), tmp_path, 5)
    assert checkpoints_in(tmp_path) == [f"model.pth.tar-{epoch}" for epoch in epochs]


def test_best_weights_without_labels_are_kept(make_engine, tmp_path, monkeypatch):
    # Untrained, a network this small puts most images into one cluster.
    monkeypatch.setattr("selcon_plugin.metrics.collapse.MAX_CLUSTER_RATIO", 1.0)
    options = {"method": "SelConCluster", "keep_best_by": "outlier_ratio"}
    engine = run(make_engine(iters_per_epoch=2, **options), tmp_path, 2)
    kept = torch.load(tmp_path / "model" / "best_without_labels.pth", weights_only=True)
    assert kept["epoch"] in (1, 2)
    assert not any(key.startswith("method.") for key in kept["state_dict"])
    if kept["epoch"] == 2:  # scored after training: the final weights
        for key, value in network_of(engine).state_dict().items():
            if not key.startswith("method."):
                assert torch.equal(value, kept["state_dict"][key])
    resumed = make_engine(iters_per_epoch=2, **options)
    resumed.resume(tmp_path)
    assert resumed._best.value == engine._best.value >= 0


def test_half_written_file_never_takes_the_place_of_a_whole_one(
    make_engine, tmp_path, monkeypatch
):
    engine = run(make_engine(iters_per_epoch=1), tmp_path, 1)
    file = tmp_path / "model" / "model.pth.tar-1"
    whole = file.read_bytes()

    def die(data, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        for epoch in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                engine.save_model(epoch, 0.0, str(tmp_path))
    assert file.read_bytes() == whole
    again = make_engine(iters_per_epoch=1)
    assert again.resume(tmp_path) == 1  # what was begun is no checkpoint


def test_best_checkpoint_has_torchreids_name(make_engine, tmp_path):
    engine = run(make_engine(iters_per_epoch=1), tmp_path, 1)
    engine.save_model(0, 0.5, str(tmp_path), is_best=True)
    best = torch.load(tmp_path / "model" / "model-best.pth.tar", weights_only=True)
    assert (best["epoch"], best["rank1"]) == (1, 0.5)

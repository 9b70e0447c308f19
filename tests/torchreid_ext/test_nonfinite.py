"""Non-finite values and collapse in whole runs of torchreid."""

import logging
import re

import pytest
import torch


def train(engine, folder, epochs=2):
    engine.run(save_dir=str(folder), max_epoch=epochs)
    return engine


def spoil_steps(engine, bad_steps):
    """Put a NaN into the third image of some steps' batches; compare before and after."""
    step, network = engine.forward_backward, engine._network
    calls, summaries = [], []

    def spoilt(batch):
        calls.append(None)
        if len(calls) - 1 not in bad_steps:
            return step(batch)
        batch["img"][2] = torch.nan
        before = {name: v.clone() for name, v in network.state_dict().items()}
        summaries.append(step(batch))
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name
        return summaries[-1]

    engine.forward_backward = spoilt
    return summaries


@pytest.mark.parametrize("method", ["SelectiveContrastive", "ClusterContrast"])
def test_run_continues_without_the_nonfinite_steps(make_engine, tmp_path, caplog, method):
    engine = make_engine(method=method, num_instances=2, ema_decay=0.9)
    summaries = spoil_steps(engine, (1, 2, 6))
    with caplog.at_level(logging.WARNING, "selcon_plugin"):
        train(engine, tmp_path)
    network = engine._network
    assert all(v.isfinite().all() for v in network.parameters())
    assert network.method.step == network.teacher.step == 10 - 3
    assert summaries == [{}] * 3
    skipped = re.findall(
        r"Skipped step (\d+): .*pixels are not finite in .*jpg", caplog.text
    )
    assert skipped == ["2", "3", "7"]


def test_options_stop_the_run(make_engine, tmp_path):
    engine = make_engine(on_nonfinite="stop")
    spoil_steps(engine, (6,))
    with pytest.raises(FloatingPointError, match=r"step 7: .*pixels are not finite"):
        train(engine, tmp_path / "stop")
    engine = make_engine(max_nonfinite_steps=2)
    spoil_steps(engine, (1, 3, 4))
    with pytest.raises(FloatingPointError, match=r"step 5: .* 2 such steps in a row"):
        train(engine, tmp_path / "bound")


def test_spoilt_checkpoint_is_not_trained_on(make_engine, tmp_path):
    train(make_engine(), tmp_path)
    file = tmp_path / "model" / "model.pth.tar-1"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"]["method.memory.mixture_bank"][[4, 7]] = torch.nan
    torch.save(checkpoint, file)
    engine = make_engine()
    engine.resume(file)
    with pytest.raises(
        FloatingPointError,
        match=r"before training: .*mixture_bank is not finite in rows 4 \(.*jpg",
    ):
        train(engine, tmp_path)


def test_features_are_measured_each_epoch(make_engine, tmp_path):
    engine, written = make_engine(), []
    engine._write = lambda group, measured: written.append((group, measured))
    train(engine, tmp_path)
    assert [group for group, _ in written] == ["Features"] * 2
    assert all(measured["effective_rank"] > 4 for _, measured in written)

"""``ImageSelConEngine`` takes a plain model of torchreid and gives it a head."""

import pytest
import torch
from torch import nn

from helpers.engines import CLUSTERING, assert_equal_states, network_of, run, state_of
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.torchreid_ext import (
    ImageSelConEngine,
    SelConModel,
)

torchreid = import_torchreid()


def plain_model(*, parallel=False, scheduler="cosine", **options):
    """A torchreid model with its classifier, as a script for identities has it."""
    torch.manual_seed(0)
    model = torchreid.models.build_model("osnet_x0_25", num_classes=8, pretrained=False)
    if parallel:
        model = nn.DataParallel(model)
    optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=0.02, **options)
    schedule = None
    if scheduler:
        schedule = torchreid.optim.build_lr_scheduler(
            optimizer,
            lr_scheduler=scheduler,
            stepsize=[1, 2] if scheduler == "multi_step" else 1,
            max_epoch=2,
        )
    return model, optimizer, schedule


@pytest.fixture
def adopt(manager):
    """Make an engine around a plain model."""

    def make(*, datamanager=None, parallel=False, scheduler="cosine", **options):
        built = plain_model(parallel=parallel, scheduler=scheduler)
        head = options.pop("head", {"num_parts": 2})
        return ImageSelConEngine(
            datamanager or manager(),
            *built,
            method="ClusterContrast",
            clustering=CLUSTERING,
            use_gpu=False,
            head=head,
            **options,
        )

    return make


@pytest.mark.parametrize("parallel", [False, True])
def test_plain_model_gets_a_head_that_learns(adopt, tmp_path, parallel):
    engine = adopt(parallel=parallel)
    network = network_of(engine)
    assert isinstance(network, SelConModel)
    assert isinstance(engine.model, nn.DataParallel) == parallel
    assert not any("classifier" in name for name, _ in network.named_parameters())
    groups = engine.optimizer.param_groups
    taught = {id(p) for p in groups[-1]["params"]}
    head = dict(network.heads.named_parameters())
    assert {id(p) for p in head.values()} <= taught
    assert not taught & {id(p) for p in network.backbone.parameters()}
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    run(engine, tmp_path, 1)
    unchanged = [n for n, p in network.named_parameters() if torch.equal(before[n], p)]
    # A gate of OSNet x0.25 squeezes to one channel, which may be dead at the start.
    assert [name for name in unchanged if "gate.fc1" not in name] == []


def test_adopted_model_resumes(adopt, tmp_path):
    unbroken = run(adopt(iters_per_epoch=2), tmp_path, 2)
    engine = adopt(iters_per_epoch=2)
    engine.resume(tmp_path / "model" / "model.pth.tar-1")
    run(engine, tmp_path / "resumed", 2)
    assert_equal_states(unbroken, engine)


@pytest.mark.parametrize("scheduler", ["single_step", "multi_step", "cosine"])
def test_schedule_lowers_the_rate_of_the_head_too(adopt, tmp_path, scheduler):
    weight = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([weight], lr=0.02)
    schedule = torchreid.optim.build_lr_scheduler(
        reference,
        lr_scheduler=scheduler,
        stepsize=[1, 2] if scheduler == "multi_step" else 1,
        max_epoch=2,
    )
    engine = adopt(scheduler=scheduler, iters_per_epoch=1)
    for epoch in range(3):  # cosine begins to rise again
        engine.start_epoch = epoch
        run(engine, tmp_path, epoch + 1)
        reference.step()
        schedule.step()
        expected = reference.param_groups[0]["lr"]
        assert expected < 0.02
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        assert rates == pytest.approx([expected] * 2)


def test_head_learns_at_the_rate_of_new_layers(manager):
    model, optimizer, schedule = plain_model(
        staged_lr=True, new_layers="classifier", base_lr_mult=0.1
    )
    ImageSelConEngine(manager(), model, optimizer, schedule, use_gpu=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.002, 0.02, 0.02])


def test_schedule_that_cannot_take_the_head_in_is_refused(manager):
    model, optimizer, _ = plain_model(scheduler=None)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)
    with pytest.raises(ValueError, match=r"LambdaLR cannot include .*build_selcon_model"):
        ImageSelConEngine(manager(), model, optimizer, warm_up, use_gpu=False)
    assert len(optimizer.param_groups) == 1


def test_without_a_schedule(adopt, tmp_path):
    run(adopt(scheduler=None, iters_per_epoch=1), tmp_path, 1)
    assert adopt(scheduler=None, iters_per_epoch=1).resume(tmp_path) == 1


@pytest.mark.parametrize("parallel", [False, True])
def test_two_stepped_learning_moves_only_the_head(adopt, tmp_path, parallel):
    engine = adopt(parallel=parallel)
    network = network_of(engine)
    engine._prepare_network()  # calibrates the head
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(engine, tmp_path, 1, fixbase_epoch=1, open_layers="heads")
    for name, value in network.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, before[name]), name
    moved = [n for n, p in network.heads.named_parameters(prefix="heads")]
    assert all(not torch.equal(before[name], state_of(engine)[name]) for name in moved)
    engine.start_epoch = 1
    run(engine, tmp_path, 2, fixbase_epoch=1, open_layers="heads")
    weight = "backbone.model.conv1.conv.weight"
    assert not torch.equal(state_of(engine)[weight], before[weight])


def test_head_of_a_model_that_has_one_is_refused(make_engine):
    with pytest.raises(ValueError, match=r"head .*'num_parts': 4.*build_selcon_model"):
        make_engine(head={"num_parts": 4})


def test_images_that_are_not_normalized_are_known_as_such(manager, adopt):
    engine = adopt(
        datamanager=manager(norm_mean=[0.5, 0.4, 0.3], norm_std=[0.2, 0.1, 0.25])
    )
    network = network_of(engine)
    assert network.pixel_mean.flatten().tolist() == pytest.approx([127.5, 102, 76.5])
    assert network.pixel_std.flatten().tolist() == pytest.approx([51, 25.5, 63.75])

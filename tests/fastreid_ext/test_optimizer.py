from __future__ import annotations

import copy

import pytest
import torch
from fastreid.config import CfgNode
from fastreid.solver import build_optimizer as build_host_optimizer
from torch import nn

from selcon_plugin.fastreid_ext.optimizer import build_optimizer, merge_groups


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # No bias before the normalization: its gradient is rounding, which Adam blows up.
        first = nn.Linear(4, 6, bias=False)
        self.backbone = nn.Sequential(first, nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.heads = nn.Linear(6, 2)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.heads(self.backbone(inputs))


@pytest.fixture
def cfg(tiny_cfg: CfgNode) -> CfgNode:
    cfg = tiny_cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.05, "SOLVER.WEIGHT_DECAY", 0.01])
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.HEADS_LR_FACTOR", 2.0])
    return cfg


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(8, 4, generator=generator).double()).square().sum().backward()
        optimizer.step()


def settings_by_parameter(optimizer: torch.optim.Optimizer) -> dict:
    return {
        id(parameter): (group["lr"], group["weight_decay"], group["freeze_status"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("clips", [False, True])
def test_steps_are_those_of_the_hosts_optimizer(
    cfg: CfgNode, name: str, clips: bool
) -> None:
    cfg.SOLVER.OPT = name
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clips
    host, ours = Network(), Network()
    train(host, build_host_optimizer(cfg, host, contiguous=False)[0])
    optimizer, groups = build_optimizer(cfg, ours)
    assert groups[0]["params"][0] is optimizer.param_groups[0]["params"][0]
    train(ours, optimizer)
    untouched = Network().unused.weight
    for found, expected in zip(ours.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(ours.unused.weight, untouched)  # no gradient, no decay


def test_each_parameter_keeps_its_settings_in_few_groups(cfg: CfgNode) -> None:
    network = Network()
    host = build_host_optimizer(cfg, network, contiguous=False)[0]
    optimizer, _ = build_optimizer(cfg, network)
    assert settings_by_parameter(optimizer) == settings_by_parameter(host)
    assert len(host.param_groups) == len(list(network.parameters()))
    settings = list(settings_by_parameter(host).values())
    assert len(optimizer.param_groups) == len(set(settings))
    assert 1 < len(set(settings)) < len(settings)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_checkpoint_of_the_hosts_optimizer_resumes(cfg: CfgNode, name: str) -> None:
    cfg.SOLVER.OPT = name
    host, ours = Network(), Network()
    theirs = build_host_optimizer(cfg, host, contiguous=False)[0]
    train(host, theirs, 4)
    ours.load_state_dict(host.state_dict())
    optimizer, _ = build_optimizer(cfg, ours)
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert [group.get("fused") for group in optimizer.param_groups] == fused
    train(host, theirs, 4)
    train(ours, optimizer, 4)
    for found, expected in zip(ours.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_weight_without_a_gradient_in_a_step_does_not_move(cfg: CfgNode, name: str) -> None:
    """Neither by weight decay nor by momentum: it was in use in the step before."""
    cfg.SOLVER.OPT = name
    network = Network()
    optimizer, _ = build_optimizer(cfg, network)
    train(network, optimizer, 1)
    heads, backbone = (
        copy.deepcopy(part.state_dict()) for part in (network.heads, network.backbone)
    )
    optimizer.zero_grad()
    network.backbone(torch.randn(8, 4).double()).square().sum().backward()
    optimizer.step()
    assert all(weight.grad is None for weight in network.heads.parameters())
    for key, before in heads.items():
        assert torch.equal(network.heads.state_dict()[key], before), key
    assert not torch.equal(network.backbone[0].weight, backbone["0.weight"])


def test_frozen_layers_stay_apart(cfg: CfgNode) -> None:
    cfg.MODEL.FREEZE_LAYERS = ["backbone"]
    cfg.SOLVER.FREEZE_ITERS = 3
    network, before = Network(), Network()
    optimizer, _ = build_optimizer(cfg, network)
    train(network, optimizer, 3)
    assert torch.equal(network.backbone[0].weight, before.backbone[0].weight)
    assert not torch.equal(network.heads.weight, before.heads.weight)
    train(network, optimizer, 1)
    assert not torch.equal(network.backbone[0].weight, before.backbone[0].weight)


@pytest.mark.parametrize("layers", [["nothing"], ["heads.bias_", "Backbone"]])
def test_layers_that_do_not_exist_are_refused(cfg: CfgNode, layers: list[str]) -> None:
    cfg.MODEL.FREEZE_LAYERS = layers
    said = rf"MODEL\.FREEZE_LAYERS .*{layers[0]}.*backbone, heads, unused: name a part"
    with pytest.raises(ValueError, match=said):
        build_optimizer(cfg, Network())


def test_fused_where_pytorch_can_and_nothing_is_clipped(cfg: CfgNode) -> None:
    def is_fused(name: str, clips: bool) -> bool:
        cfg.SOLVER.OPT = name
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clips
        optimizer, _ = build_optimizer(cfg, Network())
        return all(bool(group.get("fused")) for group in optimizer.param_groups)

    try:
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], fused=True)
        can = True
    except (RuntimeError, TypeError):  # before torch 2.4
        can = False
    assert is_fused("SGD", clips=False) == can
    assert not is_fused("SGD", clips=True)
    assert not is_fused("RMSprop", clips=False)


def test_groups_of_equal_settings_are_joined_in_order() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    groups = [
        {"params": [a], "lr": 0.1},
        {"params": [b], "lr": 0.2},
        {"lr": 0.1, "params": [c, d]},
    ]
    merged = merge_groups(groups)
    assert [group["lr"] for group in merged] == [0.1, 0.2]
    assert [list(map(id, group["params"])) for group in merged] == [
        [id(a), id(c), id(d)],
        [id(b)],
    ]
    assert len(groups[0]["params"]) == 1  # the host's own are left alone

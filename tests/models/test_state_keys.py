"""Tests of the names in the state dict of a network in training."""

from __future__ import annotations

import pytest
import torch

from selcon_plugin.models.state_keys import (
    is_method_state,
    network_weights,
    unwrapped_name,
    without_method,
)

STATE = {
    "backbone.w": torch.tensor(1.0),
    "heads.w": torch.tensor(2.0),
    "teacher.module.backbone.w": torch.tensor(3.0),
    "teacher._step": torch.tensor(4),
    "method.labels": torch.tensor([5]),
}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_the_teacher_replace_those_of_the_student(prefix):
    found = network_weights({prefix + name: tensor for name, tensor in STATE.items()})
    assert {name: float(tensor) for name, tensor in found.items()} == {
        "backbone.w": 3.0,
        "heads.w": 2.0,
    }


def test_state_of_another_network_is_unchanged():
    state = {"conv1.weight": torch.tensor(1.0), "fc.bias": torch.tensor(2.0)}
    assert network_weights(state) == state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_only_the_state_of_the_method_is_left_out(prefix):
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    kept = without_method(state)
    assert [unwrapped_name(name) for name in kept] == [*STATE][:-1]
    assert not any(is_method_state(name) for name in kept)

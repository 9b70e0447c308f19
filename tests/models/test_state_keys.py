"""Tests of the names in the state dict of a network in training."""

from __future__ import annotations

import pytest
import torch

from selcon_plugin.io.tensor_names import unwrapped_name
from selcon_plugin.models.state_keys import (
    is_method_state,
    network_weights,
    without_method,
)

STATE = {
    "backbone.w": torch.tensor(1.0),
    "heads.w": torch.tensor(2.0),
    "teacher.module.backbone.w": torch.tensor(3.0),
    "teacher._step": torch.tensor(4),
    "method.labels": torch.tensor([5]),
}


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module."])
def test_weights_of_the_teacher_replace_those_of_the_student(prefix):
    found = network_weights({prefix + name: tensor for name, tensor in STATE.items()})
    assert {name: float(tensor) for name, tensor in found.items()} == {
        "backbone.w": 3.0,
        "heads.w": 2.0,
    }


def test_state_of_another_network_is_unchanged():
    state = {"conv1.weight": torch.tensor(1.0), "fc.bias": torch.tensor(2.0)}
    assert network_weights(state) == state


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module."])
def test_only_the_state_of_the_method_is_left_out(prefix):
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    kept = without_method(state)
    assert [unwrapped_name(name) for name in kept] == [*STATE][:-1]
    assert not any(is_method_state(name) for name in kept)


def test_only_wrappers_are_removed_from_a_name():
    names = {
        "module.module.conv.weight": "conv.weight",
        "_orig_mod.module.conv.weight": "conv.weight",
        "module.backbone._orig_mod.conv.weight": "backbone.conv.weight",
        "backbone.module.weight": "backbone.module.weight",
        "teacher.module.heads.w": "teacher.module.heads.w",
        "modules.0.weight": "modules.0.weight",
    }
    assert {name: unwrapped_name(name) for name in names} == names


def test_one_tensor_under_two_names_is_refused():
    state = {"module.w": torch.tensor(1.0), "module.module.w": torch.tensor(2.0)}
    with pytest.raises(ValueError, match=r"module\.w and module\.module\.w"):
        network_weights(state)

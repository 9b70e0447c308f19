from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selcon_plugin.features import Embeddings
from selcon_plugin.methods import (
    Method,
    base,
    build_method,
    method_class,
    method_names,
    method_options,
    register_method,
)


class Minimal(Method):
    """A minimal method, which exposes the behavior of the base class."""

    def prepare(
        self, embeddings: Embeddings, camids: Tensor | None, pseudo_labels: Any = None
    ) -> None:
        self._finish_prepare()

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        return {"loss": embeddings.global_features.sum()}

    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        self._finish_update()


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'Nothing'; known .*Selective"):
        build_method("Nothing", 10, 4)


def test_unknown_option_lists_the_methods_options() -> None:
    with pytest.raises(ValueError, match="SelectiveContrastive has no option tau") as error:
        build_method("SelectiveContrastive", 10, 4, tau=0.1)
    for name in method_options("SelectiveContrastive"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "legal"),
    [
        ("num_neighbors", -1, "a whole number >= 0"),
        ("num_negatives", 0, "a whole number >= 1"),
        ("self_weight", 0.0, "a number > 0 and <= 1"),
        ("part_loss_weight", 1.1, "a number >= 0 and <= 1"),
        ("temperature", 0, "a number > 0"),
        ("bank_momentum", -0.5, "a number >= 0 and <= 1"),
        ("mixture_update", "all", "one of 'positives', 'self'"),
        ("bank_dtype", "int8", "one of 'float32', 'float16', 'bfloat16'"),
        ("warmup_epochs", 1.5, "a whole number >= 0"),
        ("normalize_parts", "yes", "True or False"),
    ],
)
def test_error_of_an_illegal_option_includes_value_and_range(
    option: str, value: Any, legal: str
) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be ") as error:
        build_method("SelectiveContrastive", 10, 4, **{option: value})
    assert legal in str(error.value)
    assert "got " + repr(float(value) if option == "temperature" else value) in str(
        error.value
    )


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_METHODS", copy.copy(base._METHODS))
    assert register_method("Minimal")(Minimal) is Minimal
    assert method_class("Minimal") is Minimal
    assert method_names() == sorted([*method_names()])
    with pytest.raises(ValueError, match="'Minimal' is already registered"):
        register_method("Minimal")(Minimal)
    assert isinstance(build_method("Minimal", 10, 4), Minimal)


def test_needs_at_least_one_image() -> None:
    with pytest.raises(ValueError, match=r"num_images .*1.*got 0"):
        Minimal(0, 4)


def test_counters_are_in_the_state_of_a_larger_model() -> None:
    method = Minimal(10, 4)
    method.start_epoch(5)
    method.prepare(Embeddings(torch.zeros(10, 4)), None)
    for _ in range(3):
        method.update(torch.tensor([0]), Embeddings(torch.zeros(1, 4)))
    fresh = Minimal(10, 4)
    assert (fresh.epoch, fresh.step, fresh.prepared) == (0, 0, False)
    nn.ModuleDict({"method": fresh}).load_state_dict(
        nn.ModuleDict({"method": method}).state_dict()
    )
    assert (fresh.epoch, fresh.step, fresh.prepared) == (5, 3, True)


def test_defaults_of_the_optional_reports() -> None:
    method = Minimal(10, 4)
    assert method.diagnostics() == {}
    assert method.selected_positives() is None


def test_missing_cameras_are_reported() -> None:
    method = Minimal(10, 4)
    method.check_cameras(None)
    method.needs_cameras = True  # type: ignore[misc]
    for camids in (None, torch.full((10,), -1)):
        with pytest.raises(ValueError, match=r"Minimal .*camera ids .*--camera-pattern"):
            method.check_cameras(camids)
    method.check_cameras(torch.zeros(10, dtype=torch.int64))

"""Comparison of the checkpoints of two runs."""

from __future__ import annotations

from typing import Any

import torch


def assert_equal(first: Any, second: Any, name: str = "") -> None:
    """Check that values are bit-identical, except for measured times in ``meter``."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first.keys() - {"meter"}:
            assert_equal(first[key], second[key], f"{name}.{key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), name
    elif isinstance(first, list):
        for pair in zip(first, second, strict=True):
            assert_equal(*pair, name)
    else:
        assert first == second, name

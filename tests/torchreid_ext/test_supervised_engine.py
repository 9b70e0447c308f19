"""torchreid's engines for identities stop at a model that trains without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.engines import NETWORK, run, torchreid
from selcon_plugin.torchreid_ext.models import build_selcon_model


@pytest.mark.parametrize("engine", ["ImageSoftmaxEngine", "ImageTripletEngine"])
@pytest.mark.parametrize("parallel", [False, True])
def test_supervised_engine_stops_with_the_remedy(
    manager: Callable[..., Any], tmp_path: Path, engine: str, parallel: bool
) -> None:
    torch.manual_seed(0)
    model: Any = build_selcon_model(
        NETWORK, pretrained=False, input_size=(64, 32), num_parts=2
    )
    model = nn.DataParallel(model) if parallel else model
    optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=0.02)
    build = getattr(torchreid.engine, engine)
    supervised = build(manager(), model, optimizer, use_gpu=False)
    with pytest.raises((RuntimeError, TypeError), match="ImageSelConEngine"):
        run(supervised, tmp_path, 1)
    assert not list(tmp_path.rglob("*.pth*"))


def test_model_of_the_engine_stops_in_a_supervised_one(
    make_engine: Callable[..., Any], manager: Callable[..., Any], tmp_path: Path
) -> None:
    engine = run(make_engine(), tmp_path / "first", 1)
    optimizer = torchreid.optim.build_optimizer(engine.model, optim="sgd", lr=0.02)
    supervised = torchreid.engine.ImageSoftmaxEngine(
        manager(), engine.model, optimizer, use_gpu=False
    )
    with pytest.raises((RuntimeError, TypeError), match="ImageSelConEngine"):
        run(supervised, tmp_path / "second", 1)

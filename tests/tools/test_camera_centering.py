"""Gain of centering on synthetic persons whose cameras add a tint."""

import sys

import numpy as np
import pytest
import torch

from camera_centering import gains, main, table


@pytest.fixture
def people():
    """Forty separable persons with twelve images each from four cameras with an offset."""
    generator = torch.Generator().manual_seed(0)
    identities = np.repeat(np.arange(40), 12)
    cameras = torch.arange(4).repeat(120)
    looks = torch.randn(40, 32, generator=generator)[identities]
    tints = torch.randn(4, 32, generator=generator)[cameras]
    noise = 0.3 * torch.randn(480, 32, generator=generator)
    return torch.nn.functional.normalize(looks + tints + noise, dim=1), cameras, identities


def test_cameras_cost_and_centering_gains(people):
    auto, auto_centered, best, best_centered = gains(*people)
    assert auto_centered > auto + 0.05
    assert best_centered > best + 0.05
    assert auto <= best
    assert auto_centered <= best_centered


def test_one_camera_gains_nothing(people):
    features, cameras, identities = people
    auto, auto_centered, best, best_centered = gains(
        features, torch.zeros_like(cameras), identities
    )
    assert (auto_centered, best_centered) == pytest.approx((auto, best))


def test_table_has_gains_with_mean_and_range():
    rows = [("one", [0.5, 0.6, 0.7, 0.7]), ("two", [0.5, 0.4, 0.6, 0.9])]
    lines = table(rows).splitlines()
    assert lines[2] == "| one | 0.500 | 0.600 | +0.100 | 0.700 | 0.700 | +0.000 |"
    assert lines[-3] == "| mean | | | +0.000 | | | +0.150 |"
    assert lines[-2] == "| least | | | -0.100 | | | +0.000 |"
    assert lines[-1] == "| most | | | +0.100 | | | +0.300 |"


def test_cameras_are_read_from_the_names(people, tmp_path, monkeypatch, capsys):
    features, cameras, identities = people
    file = tmp_path / "run.npz"
    named = zip(identities, cameras.tolist(), strict=True)
    paths = [f"/a/{who:04d}_c{c + 1}s1_{i:06d}.jpg" for i, (who, c) in enumerate(named)]
    np.savez(file, paths=np.array(paths), features=features.numpy())
    monkeypatch.setattr(sys, "argv", ["camera_centering.py", str(file)])
    main()
    expected = table([("run", gains(*people))])
    assert capsys.readouterr().out.strip() == expected
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--camera-pattern", "_d(.)"])
    with pytest.raises(SystemExit):
        main()
    assert "0000_c1s1_000000.jpg does not match '_d(.)'" in capsys.readouterr().err

"""Rules for choosing eps, on synthetic persons with a known best eps."""

import numpy as np
import pytest
import torch

from eps_without_labels import RULES, compare, read_features, table


@pytest.fixture
def people():
    """Forty separable persons with ten images each."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(40, 32, generator=generator)
    identities = np.repeat(np.arange(40), 10)
    noise = torch.randn(400, 32, generator=generator)
    features = centers[identities] + 0.5 * noise
    return torch.nn.functional.normalize(features, dim=1), identities


def test_nothing_is_lost_to_the_best(people):
    row = compare(*people)
    assert 0.5 < row["best"] <= 1
    assert all(row[rule] >= 0 for rule in RULES)
    assert row["auto"] < 0.1
    assert row["eps 0.7"] == pytest.approx(compare(*people)["eps 0.7"])


def test_other_identities_another_best(people):
    features, identities = people
    pairs = compare(features, identities // 2)
    assert pairs["best"] < compare(features, identities)["best"]


def test_identities_are_read_from_the_names(people, tmp_path):
    features, identities = people
    file = tmp_path / "run.npz"
    paths = [f"/a/{who + 1:04d}_c1s1_{i:06d}.jpg" for i, who in enumerate(identities)]
    np.savez(file, paths=np.array(paths), features=2 * features.numpy())
    found, (read,) = read_features(file, r"^(\d+)_c")
    torch.testing.assert_close(found, features)
    assert (read == identities).all()
    with pytest.raises(ValueError, match=r"0001_c1s1_000000\.jpg does not match 'x\(y\)'"):
        read_features(file, "x(y)")


def test_table_has_means_and_largest_losses():
    rows = {
        name: {"best": 0.9, "eps": 0.5, **dict.fromkeys(RULES, loss)}
        for name, loss in (("one", 0.0), ("two", 0.1))
    }
    lines = table(rows).splitlines()
    assert lines[2].startswith("| one | 0.900 | 0.5 | 0.000 |")
    assert lines[-2].startswith("| mean loss | | | 0.050 |")
    assert lines[-1].startswith("| largest loss | | | 0.100 |")

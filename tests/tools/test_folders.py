"""Study of folders: what is sampled, what is scored, and that a stopped study continues."""

import json

import numpy as np
import pytest
import torch

from folder_study.clusterings import calibration, calibration_error, score
from folder_study.drawing import MIXED, FolderSpec, Pool, draw
from folders import main
from helpers.features import people_with


@pytest.fixture
def features_file(tmp_path):
    """Sixty persons with ten images each, from six cameras, named as in Market-1501."""
    features = people_with(10, 60, noise=0.5).numpy()
    rows = [
        (person + 1, image % 6 + 1, image) for person in range(60) for image in range(10)
    ]
    paths = [
        f"{person:04d}_c{camera}s1_{frame:06d}_00.jpg" for person, camera, frame in rows
    ]
    np.savez(tmp_path / "f.npz", paths=paths, features=features)
    return tmp_path / "f.npz"


def test_folders_hold_what_their_kind_asks_for(features_file):
    pool = Pool.read([features_file])
    folder = draw(pool, FolderSpec(20, 4), 0)
    assert np.bincount(folder.identities).tolist() == [4] * 20
    assert (pool.cameras[folder.rows] == folder.camids).all()
    again = draw(pool, FolderSpec(20, 4), 0)
    assert (again.rows == folder.rows).all()
    assert (draw(pool, FolderSpec(20, 4), 1).rows != folder.rows).any()
    two = draw(pool, FolderSpec(10, 2, 2), 0)
    assert len(set(two.camids.tolist())) == 2
    unknown = draw(pool, FolderSpec(10, 2, 0), 0)
    assert set(unknown.camids.tolist()) == {-1}
    mixed = np.bincount(draw(pool, FolderSpec(20, MIXED, 6, 0.3), 0).identities)
    assert (mixed == 1).sum() == 9  # 30 % of all persons
    assert (mixed > 1).sum() == 20


def test_score_counts_pairs_and_each_outlier_as_one():
    identities = np.array([0, 0, 0, 1, 1, 2])
    found = score(np.array([0, 0, 1, 1, -1, -1]), identities)
    # Pairs: 1 of 2 is right, of 4 that exist.
    assert found.f1 == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert score(identities, identities) == (type(found))(1.0, 1.0)


def test_calibration_compares_with_the_fraction_of_mates():
    labels = np.array([0, 0, 0, 1, 1, -1])
    identities = np.array([0, 0, 1, 2, 2, 3])
    confidence = np.array([0.5, 0.5, 0.05, 0.95, 0.95, 0.9], dtype=np.float32)
    bins = calibration(confidence, labels, identities)
    assert bins[5] == pytest.approx([2, 1.0, 1.0])  # one of two others, twice
    assert bins[0] == pytest.approx([1, 0.05, 0.0])
    assert bins[9] == pytest.approx([2, 1.9, 2.0])
    assert calibration_error([bins, bins]) == pytest.approx((0.05 + 0.1) / 5)


def test_study_continues_where_it_was_stopped(features_file, tmp_path, capsys):
    torch.manual_seed(0)
    output = tmp_path / "folders.jsonl"
    command = ["--features", str(features_file), "--output", str(output)]
    assert main([*command, "--only", "0", "1"]) == 0
    first = output.read_text()
    assert main([*command, "--only", "0", "1"]) == 0
    assert output.read_text() == first
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["images"] for row in rows] == [40, 40]
    for row in rows:
        best = row["scores"]["selcon, oracle"]
        assert row["scores"]["selcon"]["ami"] > 0.9
        assert best["ami"] >= row["scores"]["selcon"]["ami"] - 0.05
    assert "expected calibration error" in capsys.readouterr().out

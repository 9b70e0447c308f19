"""Contact sheets and the projector's files, bounded in size."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize, pdist

from selcon_plugin.runs import tensorboard as pictures
from selcon_plugin.runs.tensorboard import (
    chosen_points,
    cluster_sheet,
    reduced,
    write_pictures,
)

COLORS = ["red", "lime", "blue"]


@pytest.fixture
def images(tmp_path):
    """Return nine images: clusters of 4 and 3 in different colors, and 2 outliers."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, -1])
    paths = []
    for i, label in enumerate(labels.tolist()):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 40), COLORS[label]).save(path)
        paths.append(str(path))
    features = normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    return paths, features, labels


def test_sheet_has_a_row_for_each_cluster_the_largest_first(images):
    sheet = cluster_sheet(*images)
    assert sheet.size == (8 * 68 + 4, 2 * 132 + 4)
    centers = [[4 + 32 + 68 * column for column in range(8)], [68, 68 + 132]]
    rows = [[sheet.getpixel((x, y)) for x in centers[0]] for y in centers[1]]
    lime, red, white = (0, 255, 0), (255, 0, 0), (255, 255, 255)
    assert rows[0] == [lime] * 4 + [white] * 4
    assert rows[1] == [red] * 3 + [white] * 5


def test_row_goes_from_the_middle_of_the_cluster_outwards(tmp_path):
    angles = torch.tensor([0.5, 0.0, 0.1, -0.05])  # the mean is at about 0.14
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (2, 4), (50 * i, 0, 0)).save(paths[-1])
    sheet = cluster_sheet(paths, features, torch.zeros(4, dtype=torch.int64))
    shown = [sheet.getpixel((36 + 68 * column, 68))[0] // 50 for column in range(4)]
    assert shown == [2, 1, 3, 0]


def test_unreadable_image_is_gray_and_no_cluster_is_blank(images):
    paths, features, _ = images
    paths = ["/nowhere/0.png", *paths[1:]]
    only = torch.tensor([0, *[-1] * 8])
    assert cluster_sheet(paths, features, only).getpixel((36, 68)) == (128, 128, 128)
    blank = cluster_sheet(paths, features, torch.full((9,), -1))
    assert blank.getcolors() == [(blank.width * blank.height, (255, 255, 255))]


def test_points_are_whole_clusters_then_outliers(images):
    labels = images[2]
    assert chosen_points(labels, 4).tolist() == [3, 4, 5, 6]
    assert chosen_points(labels, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert chosen_points(labels, 99).tolist() == list(range(9))
    assert chosen_points(torch.full((5,), -1), 3).tolist() == [0, 2, 4]


def test_reduced_features_keep_distances_and_then_the_largest_axes():
    features = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    whole = reduced(features, 12)
    torch.testing.assert_close(pdist(whole), pdist(features))
    few = reduced(features, 3)
    torch.testing.assert_close(few, whole[:, :3])
    assert (whole.var(dim=0).diff() <= 1e-5).all()


def test_projector_files_hold_what_tensorboard_reads(images, tmp_path):
    paths, features, labels = images
    folder = tmp_path / "run"
    write_pictures(folder, paths, [0] * 8 + [-1], features, labels, step=7)
    (vectors,) = folder.rglob("tensors.tsv")
    assert np.loadtxt(vectors).shape == (9, 5)
    (metadata,) = folder.rglob("metadata.tsv")
    rows = [line.split("\t") for line in metadata.read_text().splitlines()]
    assert rows[0] == ["cluster", "camera", "file"]
    assert rows[4] == ["1", "0", "3.png"]
    assert rows[9] == ["none", "-1", "8.png"]
    (sprite,) = folder.rglob("sprite.png")
    with Image.open(sprite) as picture:
        assert picture.size == (3 * 64, 3 * 64)
    assert "training_images" in (folder / "projector_config.pbtxt").read_text()
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    (sheet,) = events.Images("largest_clusters")
    assert (sheet.step, sheet.width, sheet.height) == (7, 548, 268)


def test_files_stay_small_however_many_images(images, tmp_path):
    paths, _, _ = images
    many = 1500
    noise = torch.randn(many, 300, generator=torch.Generator().manual_seed(2))
    some = [paths[i % 9] for i in range(many)]
    folder = tmp_path / "run"
    write_pictures(
        folder, some, [0] * many, normalize(noise), torch.arange(many) // 20, step=1
    )
    (vectors,) = folder.rglob("tensors.tsv")
    assert len(vectors.read_text().splitlines()) == pictures._MAX_POINTS
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 6e6


def test_failure_to_write_is_a_warning(images, tmp_path, caplog):
    paths, features, labels = images
    file = tmp_path / "file"
    file.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        write_pictures(file / "run", paths, [0] * 9, features, labels, step=1)
    assert "not written to TensorBoard" in caplog.text

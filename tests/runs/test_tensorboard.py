"""Contact sheets and the projector's files, bounded in size."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize, pdist

from selcon_plugin.report.sheets import contact_sheet
from selcon_plugin.runs import tensorboard as pictures
from selcon_plugin.runs.sheets import SheetRow, thumbnail
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


# A row is a line of text of 18 pixels and cells of 72 x 136, which have a frame of 4.
ROW, COLUMN = 18 + 136 + 2 * 4, 72 + 4
MIDDLES = [4 + 36 + COLUMN * column for column in range(8)]
FIRST = 4 + 18 + 68  # height of the middle of the first row


def test_sheet_has_a_row_for_each_cluster_the_largest_first(images):
    sheet = cluster_sheet(*images)
    assert sheet.size == (4 * COLUMN + 4, 2 * ROW + 4)
    rows = [[sheet.getpixel((x, FIRST + y)) for x in MIDDLES[:4]] for y in (0, ROW)]
    lime, red, white = (0, 255, 0), (255, 0, 0), (255, 255, 255)
    assert rows == [[lime] * 4, [red] * 3 + [white]]


def test_sheet_of_tensorboard_and_of_a_folder_are_one(images, tmp_path):
    paths, features, labels = images
    rows = [
        SheetRow("cluster 1: 4 images", paths[3:7]),
        SheetRow("cluster 0: 3 images", paths[:3]),
    ]
    written = contact_sheet(tmp_path / "sheet.png", rows, columns=8)
    with Image.open(written) as sheet:
        assert sheet.tobytes() == cluster_sheet(paths, features, labels).tobytes()


def test_row_goes_from_the_middle_of_the_cluster_outwards(tmp_path):
    angles = torch.tensor([0.5, 0.0, 0.1, -0.05])  # the mean is at about 0.14
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (2, 4), (50 * i, 0, 0)).save(paths[-1])
    sheet = cluster_sheet(paths, features, torch.zeros(4, dtype=torch.int64))
    shown = [sheet.getpixel((x, FIRST))[0] // 50 for x in MIDDLES[:4]]
    assert shown == [2, 1, 3, 0]


def test_unreadable_image_is_gray_and_no_cluster_is_an_error(images):
    paths, features, _ = images
    paths = ["/nowhere/0.png", *paths[1:]]
    only = torch.tensor([0, *[-1] * 8])
    sheet = cluster_sheet(paths, features, only)
    assert sheet.getpixel((MIDDLES[0], FIRST)) == (128, 128, 128)
    with pytest.raises(ValueError, match="no groups"):
        cluster_sheet(paths, features, torch.full((9,), -1))


def test_images_are_rotated_as_their_exif_data_says(tmp_path):
    image = Image.new("RGB", (128, 64), "red")
    image.paste("blue", (0, 0, 64, 64))  # the left half; the upper one after rotation
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    path = str(tmp_path / "rotated.jpg")
    image.save(path, exif=exif, quality=95)
    upper, lower = (thumbnail(path, (64, 128)).getpixel((32, y)) for y in (20, 108))
    assert upper[2] > 200
    assert lower[0] > 200


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
    assert (sheet.step, sheet.width, sheet.height) == (7, 4 * COLUMN + 4, 2 * ROW + 4)


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

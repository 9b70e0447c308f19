"""Unreadable images before the training, during it, and when it resumes."""

import logging
import multiprocessing as mp
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from selcon_plugin.clustering import Labeler, PseudoLabels
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.engine.batches import build_sampler
from selcon_plugin.engine.extraction import calibrate_normalization, extract_embeddings
from selcon_plugin.engine.image_check import (
    BadImagesError,
    check_test_images,
    readable_items,
    report_unreadable,
)
from selcon_plugin.engine.image_list import images_to_resume_with, write_image_list
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.engine.run import TrainingRun
from selcon_plugin.engine.run_options import RunOptions
from selcon_plugin.features import GlobalPartEmbedding
from selcon_plugin.methods import build_method
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.samplers.stream import SampleKey

IMAGES = 12


class Images(IndexedImages):
    """Samples with nothing of a host."""

    def sample(self, index, image):
        return {"image": image, "index": index}

    def image_of(self, sample):
        return sample["image"]


def to_tensor(image):
    """Show which image it is by its shade; a transform that draws nothing."""
    return torch.from_numpy(np.array(image.resize((8, 16)))).permute(2, 0, 1).float()


@pytest.fixture
def items(tmp_path):
    """Twelve images, each of a shade of its own: 20 times its number."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(IMAGES):
        Image.new("RGB", (8, 16), (20 * i,) * 3).save(folder / f"{i:02}.png")
    return [(str(folder / f"{i:02}.png"), i % 3, i % 2) for i in range(IMAGES)]


@pytest.fixture
def images(items):
    return Images(items, read_rgb, to_tensor, seed=3)


def shade(sample):
    return round(float(sample["image"].mean()) / 20)


# --- replacements ------------------------------------------------------------------------


def test_replacement_comes_with_its_own_index(images):
    os.unlink(images.paths[4])
    drawn = [images[SampleKey(4, position)] for position in range(60)]
    assert [shade(sample) for sample in drawn] == [sample["index"] for sample in drawn]
    others = {sample["index"] for sample in drawn}
    assert 4 not in others
    assert len(others) > 8  # not always the same
    assert images[SampleKey(5, 0)]["index"] == 5


def test_replacement_follows_from_seed_and_position(images, items):
    os.unlink(images.paths[4])
    keys = [SampleKey(4, position) for position in range(20)]
    expected = [images[key]["index"] for key in keys]
    again = Images(items, read_rgb, to_tensor, seed=3)
    assert [again[key]["index"] for key in reversed(keys)] == expected[::-1]
    other = Images(items, read_rgb, to_tensor, seed=4)
    assert [other[key]["index"] for key in keys] != expected


def test_replacement_is_of_the_same_cluster_while_it_has_readable_images(images):
    images.labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1])

    def replacements(index):
        return {images[SampleKey(index, p)]["index"] for p in range(60)}

    for gone in (5, 9):
        os.unlink(images.paths[gone])
    assert replacements(5) == {4, 6, 7}
    assert replacements(9) == {8, 10, 11}  # an outlier was sampled: outliers may replace it
    for gone in (4, 6, 7):
        os.unlink(images.paths[gone])
    assert replacements(5) == {0, 1, 2, 3}  # of another cluster, never an outlier
    for gone in (8, 10, 11):
        os.unlink(images.paths[gone])
    assert replacements(9) == {0, 1, 2, 3}


def test_where_nothing_can_be_read_the_run_stops_and_does_not_hang(images):
    for path in images.paths:
        os.unlink(path)
    with pytest.raises(RuntimeError, match=r"04\.png cannot be read.*check that the disk"):
        images[SampleKey(4, 0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_which_report_to_the_training(images, workers):
    keys = [SampleKey(i, i) for i in range(IMAGES)] * 2
    for gone in (2, 7):
        os.unlink(images.paths[gone])
    expected = [images[key]["index"] for key in keys]
    images.reset_unreadable()
    images.pop_unreported()
    loader = DataLoader(images, batch_size=4, sampler=keys, num_workers=workers)
    index = torch.cat([batch["index"] for batch in loader])
    assert index.tolist() == expected
    assert images.unreadable.nonzero().flatten().tolist() == [2, 7]


def test_what_failed_is_reported_once_and_cleared_when_it_can_be_read(images):
    content = Path(images.paths[4]).read_bytes()
    os.unlink(images.paths[4])
    images[SampleKey(4, 0)]
    assert images.pop_unreported().nonzero().tolist() == [[4]]
    assert not images.pop_unreported().any()
    assert images.unreadable[4]
    Path(images.paths[4]).write_bytes(content)
    assert images[SampleKey(4, 0)]["index"] == 4
    assert not images.unreadable.any()
    view = images.with_transform(to_tensor)
    os.unlink(images.paths[5])
    view[5]
    assert images.unreadable[5]  # the views of a run share what they know


def test_own_features_of_an_unreadable_image_are_those_of_a_blank_one(images):
    os.unlink(images.paths[4])
    sample = images[4]
    assert sample["index"] == 4
    assert not sample["image"].any()


# --- before the training -----------------------------------------------------------------


def test_broken_files_are_left_out_and_reported_once(items, caplog):
    open(items[3][0], "wb").close()
    os.unlink(items[8][0])
    readable, left_out = readable_items(items[::-1], 0.2)
    assert readable == [item for i, item in enumerate(items) if i not in (3, 8)]
    assert left_out == 2
    (record,) = caplog.records
    message = record.getMessage()
    assert "2 of 12 images cannot be read and are left out" in message
    assert f"{items[3][0]}: empty file" in message
    assert f"{items[8][0]}: No such file" in message


def test_too_many_broken_files_stop_the_run_with_list_and_remedy(items):
    for i in (3, 8):
        open(items[i][0], "wb").close()
    match = r"2 of 12 .*0\.15(.|\n)*max_unreadable_ratio(.|\n)*03\.png: empty(.|\n)*08\.png"
    with pytest.raises(BadImagesError, match=match):
        readable_items(items, 0.15)
    assert readable_items(items, 2 / 12)[1] == 2  # the bound itself is allowed
    with pytest.raises(BadImagesError):
        readable_items(items[3:4], 0.99)


def test_clean_data_says_nothing(items, caplog):
    assert readable_items(items, 0.0) == (items, 0)
    check_test_images([item[0] for item in items])
    assert not caplog.records


def test_test_set_with_a_broken_file_is_refused(items):
    open(items[3][0], "wb").close()
    with pytest.raises(BadImagesError, match=r"1 of 12 test images(.|\n)*03\.png: empty"):
        check_test_images([item[0] for item in items])


# --- during the training -----------------------------------------------------------------


def report(images, unreported, share):
    mask = torch.zeros(IMAGES, dtype=torch.bool)
    mask[unreported] = True
    report_unreadable(
        images,
        unreported=mask,
        unreadable=torch.zeros_like(mask),
        max_unreadable_ratio=share,
        what_happened="others replaced them",
    )


def test_report_names_files_and_reasons_and_counts_those_left_out_before(images, caplog):
    os.unlink(images.paths[4])
    report(images, [4, 5], 0.5)
    (record,) = caplog.records
    message = record.getMessage()
    assert "2 of 12 training images can no longer be read; others replaced them" in message
    assert f"{images.paths[4]}: No such file" in message
    assert f"{images.paths[5]}: readable again" in message
    images.num_left_out = 3
    with pytest.raises(BadImagesError, match=r"5 of 15"):
        report(images, [4, 5], 4 / 15)
    report(images, [], 0.0)


class Halves(Labeler):
    """Two clusters by the order of the images; notes what it was given."""

    def __init__(self):
        self.given = []

    def cluster(self, features):
        self.given.append(features)
        return PseudoLabels.numbered(np.arange(len(features)) * 2 // len(features))


@pytest.fixture
def make_run(images):
    """Make a run around a small network."""

    def make(method, labeler=None, planner="stream"):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        network = EmbeddingNetwork(
            backbone,
            GlobalPartEmbedding(8, 8, 0),
            Preprocessing(pixel_mean=(0.0,) * 3, pixel_std=(255.0,) * 3),
            images_normalized=False,
        )
        network.method = build_method(method, len(images), 8)

        def batches():
            for batch in DataLoader(images, batch_size=5):
                yield batch["image"], batch["index"]

        return TrainingRun(
            network,
            images,
            build_sampler(planner, len(images), batch_size=4, num_instances=2),
            labeler,
            extract=lambda: extract_embeddings(network, batches(), len(images)),
            calibrate=lambda: calibrate_normalization(network, images, 4),
            options=RunOptions(max_unreadable_ratio=0.2),
        )

    return make


def test_unreadable_images_are_in_no_cluster_and_move_nobody_elses_label(
    make_run, images, caplog
):
    os.unlink(images.paths[4])
    labeler = Halves()
    run = make_run("ClusterContrast", labeler, "pk")
    run.before_training()
    run.start_epoch(0)
    with caplog.at_level(logging.WARNING, "selcon_plugin"):
        run.refresh_pseudo_labels(0, 0)
    assert run.method.labels.tolist() == [0] * 4 + [-1] + [0] * 2 + [1] * 5
    assert len(labeler.given[0]) == IMAGES - 1
    warnings = [r.getMessage() for r in caplog.records if "can no longer" in r.getMessage()]
    assert len(warnings) == 1
    assert "04.png" in warnings[0]
    # What the others' rows hold is what they hold where no file is missing.
    assert torch.equal(
        labeler.given[0],
        run.extract().global_features[[i for i in range(IMAGES) if i != 4]],
    )
    drawn = {key.index for key, _ in zip(run.sampler, range(40), strict=False)}
    assert 4 not in drawn


def test_features_of_unreadable_images_are_zero_in_the_banks(make_run, images):
    os.unlink(images.paths[4])
    run = make_run("SelectiveContrastive")
    run.before_training()
    norms = run.method.memory.global_bank.norm(dim=1)
    expected = torch.ones(IMAGES)
    expected[4] = 0
    assert torch.allclose(norms, expected, atol=1e-5)


def test_end_of_an_epoch_warns_once_and_stops_past_the_bound(make_run, images, caplog):
    run = make_run("SelectiveContrastive")
    run.before_training()
    run._report_unreadable()
    assert not caplog.records
    for gone in (4, 5):
        os.unlink(images.paths[gone])
        images[SampleKey(gone, 0)]
    run._report_unreadable()
    run._report_unreadable()
    assert len(caplog.records) == 1
    os.unlink(images.paths[6])
    images[SampleKey(6, 0)]
    with pytest.raises(BadImagesError, match="3 of 12"):
        run._report_unreadable()


# --- resuming ----------------------------------------------------------------------------


def test_resumed_run_keeps_the_row_of_a_file_that_vanished(items, tmp_path, caplog):
    images = Images(items, read_rgb, to_tensor)
    images.num_left_out = 2
    fingerprint = images.fingerprint
    os.unlink(images.paths[4])
    write_image_list(tmp_path, images)
    now = Images(items[:4] + items[5:], read_rgb, to_tensor, seed=9)
    resumed = images_to_resume_with(tmp_path, now)
    for name in ("paths", "camids", "evaluation_only_pids", "sizes", "num_left_out"):
        assert getattr(resumed, name) == getattr(images, name)
    assert resumed.fingerprint == fingerprint
    assert (resumed.seed, resumed.transform) == (9, to_tensor)
    assert isinstance(resumed, Images)
    assert "04.png" in caplog.text


def test_other_images_are_not_taken_for_those_of_the_run(items, tmp_path):
    write_image_list(tmp_path, Images(items[:-1], read_rgb, to_tensor))
    same = Images(items[:-1], read_rgb, to_tensor)
    more = Images(items, read_rgb, to_tensor)
    other = Images([(p, pid, 1 - cam) for p, pid, cam in items[:4]], read_rgb, to_tensor)
    Image.effect_noise((40, 40), 90).save(items[2][0])
    changed = Images(items[:4], read_rgb, to_tensor)
    for images in (same, more, other, changed):
        assert images_to_resume_with(tmp_path, images) is images


@pytest.mark.parametrize("content", [None, "", "[]", '{"images": 1', "{}"])
def test_no_list_or_a_broken_one_changes_nothing(items, tmp_path, content):
    if content is not None:
        (tmp_path / "images.json").write_text(content)
    images = Images(items, read_rgb, to_tensor)
    assert images_to_resume_with(tmp_path, images) is images


def test_run_without_a_folder_writes_no_list(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image_list("", images)
    assert not (tmp_path / "images.json").exists()


# --- several processes -------------------------------------------------------------------


def _on_two_ranks(process, port, items, queue):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=2
    )
    readable, left_out = readable_items(items if process else items[::-1], 0.5)
    try:
        readable_items(items, 0.0)
        stopped = False
    except BadImagesError:
        stopped = True
    queue.put(([item[0] for item in readable], left_out, stopped))
    dist.destroy_process_group()


def test_all_processes_leave_out_the_same_images(items):
    os.unlink(items[3][0])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = mp.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_on_two_ranks, args=(rank, port, items, queue))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    expected = [item[0] for i, item in enumerate(items) if i != 3]
    assert found == [(expected, 1, True)] * 2

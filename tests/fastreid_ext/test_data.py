import random

import numpy as np
import pytest
import torch
from fastreid.data.transforms import build_transforms
from fastreid.utils.env import seed_all_rng
from PIL import Image

from selcon_plugin.fastreid_ext.data import (
    IndexedDataset,
    build_train_loader,
    training_items,
)
from selcon_plugin.samplers.stream import SampleKey, StreamSampler


@pytest.fixture
def dataset(tiny_cfg):
    items = training_items(tiny_cfg)
    return IndexedDataset(items, build_transforms(tiny_cfg, is_train=True), seed=3)


def test_target_is_the_own_index_and_no_identity_leaves_the_door(dataset):
    sample = dataset[5]
    assert sample["targets"] == 5
    assert set(sample) == {"images", "targets", "camids", "img_paths"}
    assert dataset.num_classes == len(dataset)


def test_order_does_not_depend_on_the_file_system(dataset, tiny_cfg):
    items = training_items(tiny_cfg)
    random.Random(0).shuffle(items)
    again = IndexedDataset(items, dataset.transform, seed=3)
    assert again.paths == dataset.paths
    assert again.fingerprint == dataset.fingerprint


def test_fingerprint_notices_a_missing_image_and_another_camera(dataset):
    items = list(
        zip(dataset.paths, dataset.evaluation_only_pids, dataset.camids, strict=True)
    )
    assert IndexedDataset(items[1:], None).fingerprint != dataset.fingerprint
    items[0] = (*items[0][:2], items[0][2] + 1)
    assert IndexedDataset(items, None).fingerprint != dataset.fingerprint


def test_augmentation_follows_only_the_position(dataset):
    first = dataset[SampleKey(2, 70)]["images"]
    seed_all_rng(999)
    assert torch.equal(dataset[SampleKey(2, 70)]["images"], first)
    others = [dataset[SampleKey(2, position)]["images"] for position in range(71, 76)]
    assert any(not torch.equal(other, first) for other in others)


def test_loading_keeps_the_global_random_streams(dataset):
    seed_all_rng(5)
    expected = (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002
    seed_all_rng(5)
    dataset[0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers_and_resume_anywhere(tiny_cfg, num_workers):
    reference = build_train_loader(tiny_cfg)
    batches = [batch for batch, _ in zip(reference, range(4), strict=False)]
    tiny_cfg.DATALOADER.NUM_WORKERS = num_workers
    resumed = build_train_loader(tiny_cfg)
    resumed.sampler.start = 2
    for expected, batch in zip(batches[2:], resumed, strict=False):
        assert torch.equal(batch["images"], expected["images"])
        assert torch.equal(batch["targets"], expected["targets"])


@pytest.mark.parametrize("mode", ["P", "RGBA", "L"])
def test_palette_gray_and_transparent_images_keep_their_colors(tmp_path, mode):
    picture = Image.new("RGB", (4, 8), (200, 30, 30)).convert(mode)
    picture.save(tmp_path / "a.png")
    dataset = IndexedDataset([(str(tmp_path / "a.png"), -1, -1)], transform=np.asarray)
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(dataset[0]["images"], expected)


def test_fewer_images_than_a_batch_is_an_error_that_states_it(tiny_cfg):
    tiny_cfg.SOLVER.IMS_PER_BATCH = 64
    with pytest.raises(
        ValueError, match=r"40 training images.*batch size \(64\).*IMS_PER_BATCH"
    ):
        build_train_loader(tiny_cfg)


def test_identity_samplers_give_way_with_a_warning(tiny_cfg, caplog):
    tiny_cfg.DATALOADER.SAMPLER_TRAIN = "BalancedIdentitySampler"
    loader = build_train_loader(tiny_cfg)
    assert "BalancedIdentitySampler" in caplog.text
    assert isinstance(loader.sampler, StreamSampler)


def test_extra_images_join_the_training_set_without_camera(tiny_cfg, tmp_path):
    names = [str(tmp_path / f"made_{i}.jpg") for i in range(3)]
    for name in names:
        Image.new("RGB", (32, 64), (200, 30, 30)).save(name)
    plain = build_train_loader(tiny_cfg).dataset
    tiny_cfg.MODEL.SELCON.EXTRA_IMAGES = str(tmp_path)
    dataset = build_train_loader(tiny_cfg).dataset
    assert sorted(dataset.paths) == sorted(plain.paths + names)
    assert {dataset.camids[dataset.paths.index(name)] for name in names} == {-1}

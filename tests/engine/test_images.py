"""The door where identities are dropped, whatever the host."""

import pickle
import random

import numpy as np
import pytest
import torch

from selcon_plugin.datasets.numbering import UNKNOWN
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.run import seed_all
from selcon_plugin.samplers.stream import SampleKey


class Images(IndexedImages):
    """Samples with nothing of a host."""

    def sample(self, index, image):
        return {"image": image, "index": index}

    def image_of(self, sample):
        return sample["image"]


def draw(path):
    """A transform that draws from all three global streams, as the hosts' do."""
    del path
    return torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])  # noqa: NPY002


def images(items, transform=None, seed=0):
    return Images(items, str, transform, seed)


@pytest.fixture
def files(tmp_path):
    """Five files with identities and cameras."""
    items = []
    for i in range(5):
        file = tmp_path / f"{i}.jpg"
        file.write_bytes(b"x" * (i + 1))
        items.append((str(file), f"p{i % 2}", i % 3))
    return items


def test_sample_holds_its_index_and_no_identity():
    dataset = images([("b", 7, 0), ("a", 3, 1)], transform=str.upper)
    assert [dataset[i] for i in range(2)] == [
        {"image": "A", "index": 0},
        {"image": "B", "index": 1},
    ]
    assert dataset.evaluation_only_pids == [
        0,
        1,
    ]  # by their order, and only for diagnostics
    assert len(dataset) == 2


def test_host_defines_the_sample():
    dataset = IndexedImages([("a", 0, 0)], str, str.upper)
    with pytest.raises(NotImplementedError):
        dataset[0]
    with pytest.raises(NotImplementedError):
        dataset.image_of({})


def test_order_is_that_of_the_paths():
    items = [(f"{i:02}.jpg", i % 4, i % 3) for i in range(12)]
    shuffled = items.copy()
    random.Random(0).shuffle(shuffled)
    first, second = images(items), images(shuffled)
    for name in ("paths", "evaluation_only_pids", "camids"):
        assert getattr(first, name) == getattr(second, name)
    assert first.paths == sorted(first.paths)


def test_unknown_cameras_are_minus_one_and_known_ones_count_from_zero():
    dataset = images([("b", -1, "lobby"), ("a", -1, -1), ("c", -1, "door")])
    assert dataset.camids == [-1, 1, 0]
    assert dataset.num_cameras == 2
    assert dataset.evaluation_only_pids == [-1, -1, -1]
    assert torch.equal(dataset.camera_ids, torch.tensor([-1, 1, 0]))
    assert dataset.camera_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ([10, 2, 33], [1, 0, 2]),  # as numbers: 2 comes before 10
        (["10", "2"], [0, 1]),  # as words
        (["lobby", 10, "door", 2], [3, 1, 2, 0]),  # numbers before names
        ([5, UNKNOWN, 5, "x"], [0, -1, 0, 1]),
        ([UNKNOWN, UNKNOWN], [-1, -1]),
    ],
)
def test_names_are_numbered_in_order(names, numbers):
    items = [(f"{place:02}", name, name) for place, name in enumerate(names)]
    dataset = images(items)
    assert dataset.camids == dataset.evaluation_only_pids == numbers


@pytest.mark.parametrize(
    ("pids", "known"),
    [
        ([4, 4, 9, 9], [0, 0, 1, 1]),
        ([4, 4, 9, UNKNOWN], None),  # some are not known
        ([UNKNOWN] * 4, None),
        ([4, 4, 4, 4], None),  # all have one
        ([4, 5, 6, 7], None),  # each its own
    ],
)
def test_identities_that_say_nothing_are_not_known(pids, known):
    dataset = images([(str(place), pid, 0) for place, pid in enumerate(pids)])
    found = dataset.evaluation_only_identities
    assert (found if found is None else found.tolist()) == known


def test_another_transform_keeps_images_order_and_cameras():
    items = [(f"{i:02}", f"p{i % 5}", f"cam{i:02}") for i in range(12)]
    dataset = images(items, seed=4)
    other = dataset.with_transform(len)
    assert (other.transform, dataset.transform) == (len, None)
    assert isinstance(other, Images)
    for name in ("paths", "camids", "evaluation_only_pids", "seed"):
        assert getattr(other, name) == getattr(dataset, name)


def test_fingerprint_notices_a_missing_image_and_another_camera(files):
    fingerprint = images(files).fingerprint
    assert images(list(reversed(files))).fingerprint == fingerprint
    assert images(files[1:]).fingerprint != fingerprint
    path, pid, _ = files[0]
    assert images([(path, pid, 2), *files[1:]]).fingerprint != fingerprint
    # Identities are none of its business.
    assert images([(path, "x", 0), *files[1:]]).fingerprint == fingerprint


def test_fingerprint_notices_another_picture_of_the_same_name(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(b"one")
    items = [(str(file), -1, -1)]
    before = images(items).fingerprint
    file.write_bytes(b"other")
    assert images(items).fingerprint != before


def test_fingerprint_is_the_same_in_another_place(files, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    others = []
    for path, pid, camid in files:
        name = path.rpartition("/")[2]
        (moved / name).write_bytes((tmp_path / name).read_bytes())
        others.append((str(moved / name), pid, camid))
    assert images(others).fingerprint == images(files).fingerprint


def test_augmentation_follows_only_seed_and_position():
    dataset = images([("a", 0, 0), ("b", 0, 0)], draw, seed=3)
    first = dataset[SampleKey(1, 70)]["image"]
    seed_all(999)
    assert torch.equal(dataset[SampleKey(1, 70)]["image"], first)
    assert torch.equal(dataset[SampleKey(0, 70)]["image"], first)  # whatever the image
    for other in (
        dataset[SampleKey(1, 71)],
        images([("a", 0, 0), ("b", 0, 0)], draw, seed=4)[SampleKey(1, 70)],
    ):
        assert not (other["image"] == first).any()


def test_loading_keeps_the_global_random_streams():
    dataset = images([("a", 0, 0)], draw)
    seed_all(5)
    expected = draw("")
    seed_all(5)
    dataset[0]
    assert torch.equal(draw(""), expected)


def test_workers_draw_the_same():
    dataset = images([(str(i), 0, 0) for i in range(6)], draw, seed=1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2)
    found = torch.cat([batch["image"] for batch in loader])
    expected = torch.stack([dataset[i]["image"] for i in range(6)])
    assert torch.equal(found, expected)


def test_images_go_to_another_process_whole(files):
    dataset = images(files, len, seed=2)
    other = pickle.loads(pickle.dumps(dataset))
    assert other.fingerprint == dataset.fingerprint
    assert other[3] == dataset[3]

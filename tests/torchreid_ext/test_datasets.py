"""Our data sets through torchreid's own ImageDataManager."""

import copy
import importlib.util
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.datasets import SyntheticPersonsSpec, generate_synthetic_persons
from selcon_plugin.torchreid_ext import datasets
from selcon_plugin.torchreid_ext.datasets import (
    UNKNOWN_CAMERA,
    UNKNOWN_PID,
    ImageFolderReID,
    SyntheticPersons,
    register_datasets,
    register_image_folder,
    register_synthetic_persons,
)

torchreid = import_torchreid()
needs_fastreid = pytest.mark.skipif(
    importlib.util.find_spec("fastreid") is None, reason="FastReID is not installed"
)

SPEC = SyntheticPersonsSpec(
    num_train_ids=3, num_test_ids=2, images_per_id=4, num_cameras=3, num_distractors=2
)
OTHER_SPEC = SyntheticPersonsSpec(
    num_train_ids=2, num_test_ids=2, images_per_id=2, num_cameras=2, num_distractors=0
)


@pytest.fixture(autouse=True)
def registry():
    """torchreid's registry of image data sets; what a test adds is removed."""
    registry = vars(torchreid.data.datasets)["__image_datasets"]
    before = dict(registry)
    yield registry
    registry.clear()
    registry.update(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    generate_synthetic_persons(root, OTHER_SPEC)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images: two cameras, and two images of unknown camera."""
    folder = tmp_path_factory.mktemp("crops")
    for number, name in enumerate(
        ["lobby/a.jpg", "lobby/b.jpg", "door/a.jpg", "door/b.jpg", "x.jpg", "y.jpg"]
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 16), (40 * number, 0, 0)).save(path)
    return folder


def manager(root, sources, **options):
    return torchreid.data.ImageDataManager(
        root=str(root),
        sources=sources,
        height=16,
        width=8,
        batch_size_train=2,
        batch_size_test=3,
        use_gpu=False,
        workers=0,
        **options,
    )


def column(items, i):
    return [item[i] for item in items]


# --- synthetic people --------------------------------------------------------------------


def test_synthetic_persons_have_the_size_that_was_asked_for(root):
    register_synthetic_persons("a_few", SPEC)
    data = manager(root, "a_few")
    train = data.train_loader.dataset.train
    query, gallery = data.fetch_test_loaders("a_few")
    assert data.num_train_pids == 3
    assert data.num_train_cams == 3
    assert len(train) == 12
    assert len(query) + len(gallery) == 2 * 4 + 2
    assert sorted(set(column(train, 1))) == [0, 1, 2]
    assert set(column(train, 2)) == {0, 1, 2}
    # Identities as the files have them: 1 to 3 train, 4 and 5 test, 0 distracts.
    assert set(column(query, 1)) == {4, 5}
    assert set(column(gallery, 1)) == {0, 4, 5}
    for path, pid, camid, dsetid in train:
        assert Path(path).name.startswith(f"{pid + 1:04d}_c{camid + 1}")
        assert dsetid == 0


def test_loaders_give_every_test_image_once_and_full_training_batches(root):
    register_synthetic_persons("a_few", SPEC)
    data = manager(root, "a_few")
    batches = list(data.train_loader)
    assert [tuple(batch["img"].shape) for batch in batches] == 6 * [(2, 3, 16, 8)]
    query, gallery = data.fetch_test_loaders("a_few")
    for split, items in (("query", query), ("gallery", gallery)):
        seen = [p for batch in data.test_loader["a_few"][split] for p in batch["impath"]]
        assert seen == column(items, 0)


def test_synthetic_persons_draw_themselves_under_the_root(tmp_path, monkeypatch):
    spec = SyntheticPersonsSpec(1, 1, 2, 2, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for root, there in (("data", tmp_path / "data"), ("~/data", tmp_path / "home/data")):
        data = SyntheticPersons(root=root, spec=spec, verbose=False)
        assert [Path(path).parents[2] for path, *_ in data.train] == [there, there]


def test_registered_default_has_the_default_size(monkeypatch):
    asked = []

    def generate(root, spec, **options):
        asked.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "generate_synthetic_persons", generate)
    register_datasets()
    with pytest.raises(KeyboardInterrupt):
        manager("anywhere", "syntheticpersons")
    assert asked == [SyntheticPersonsSpec()]


def test_combineall_adds_the_test_people_as_further_identities(root):
    register_synthetic_persons("a_few", SPEC)
    data = manager(root, "a_few", combineall=True)
    train = data.train_loader.dataset.train
    assert len(train) == 12 + 2 * 4 + 2
    assert len(set(column(train, 0))) == len(train)
    assert set(column(train, 1)) == set(range(6))  # the distractors count as one person
    assert data.num_train_pids == 6


@needs_fastreid
@pytest.mark.parametrize("combineall", [False, True])
def test_synthetic_persons_are_those_of_fastreid(root, combineall):
    from selcon_plugin.fastreid_ext.datasets import SyntheticPersons as FastReIDs

    ours = SyntheticPersons(root=str(root), spec=SPEC, combineall=combineall)
    theirs = FastReIDs(root=str(root), spec=SPEC, combineall=combineall)
    assert column(ours.train, 0) == column(theirs.train, 0)
    # FastReID: synthetic_2, and synthetic_test_2 for a test camera among the training's.
    assert column(ours.train, 2) == [int(c.split("_")[-1]) for c in column(theirs.train, 2)]
    without_dset = [[item[:3] for item in split] for split in (ours.query, ours.gallery)]
    assert without_dset == [theirs.query, theirs.gallery]


# --- a folder of images ------------------------------------------------------------------


def test_image_folder_is_the_root_and_has_no_test_set(folder, caplog):
    register_datasets()
    with caplog.at_level(logging.WARNING):
        data = manager(folder, "imagefolderreid")
    train = data.train_loader.dataset.train
    assert [
        (str(Path(path).relative_to(folder)), camid) for path, _, camid, _ in train
    ] == [
        ("door/a.jpg", 0),
        ("door/b.jpg", 0),
        ("lobby/a.jpg", 1),
        ("lobby/b.jpg", 1),
        ("x.jpg", -1),
        ("y.jpg", -1),
    ]
    assert set(column(train, 1)) == {-1}
    assert (data.num_train_pids, data.num_train_cams) == (1, 3)
    batch = next(iter(data.train_loader))
    assert batch["pid"].tolist() == [-1, -1]

    assert data.fetch_test_loaders("imagefolderreid") == ([], [])
    for loader in data.test_loader["imagefolderreid"].values():
        assert list(loader) == []
    (notice,) = [record.getMessage() for record in caplog.records]
    assert "has no test set" in notice
    assert "targets=[]" in notice


def test_image_folder_without_targets_says_nothing(folder, caplog):
    register_datasets()
    with caplog.at_level(logging.WARNING):
        data = manager(folder, "imagefolderreid", targets=[])
    assert data.test_loader == {}
    assert not caplog.records


def test_image_folder_is_decoded_once(folder, monkeypatch):
    calls = []
    read = datasets.read_image_folder
    monkeypatch.setattr(
        datasets,
        "read_image_folder",
        lambda *args, **options: calls.append(args) or read(*args, **options),
    )
    register_datasets()
    manager(folder, "imagefolderreid")
    assert len(calls) == 1


def test_image_folder_takes_a_camera_pattern(folder):
    register_image_folder("letters", folder, camera_pattern=r"([ab])\.jpg")
    data = manager("elsewhere", "letters", targets=[])
    names = {
        Path(path).stem: camid for path, _, camid, _ in data.train_loader.dataset.train
    }
    assert names == {"a": 0, "b": 1, "x": -1, "y": -1}


def test_image_folder_keeps_all_its_images_under_combineall(folder):
    register_datasets()
    data = manager(folder, "imagefolderreid", targets=[], combineall=True)
    assert len(data.train_loader.dataset) == 6


@needs_fastreid
def test_image_folder_is_that_of_fastreid(folder):
    from selcon_plugin.fastreid_ext.datasets import ImageFolderReID as FastReIDs

    ours = ImageFolderReID(folder=str(folder))
    theirs = FastReIDs(image_folder=str(folder))
    assert column(ours.train, 0) == column(theirs.train, 0)
    names = {0: "door", 1: "lobby", -1: -1}
    assert [names[camid] for camid in column(ours.train, 2)] == column(theirs.train, 2)
    assert column(ours.train, 1) == column(theirs.train, 1)


# --- several sources ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", [("crops", "a_few", "other"), ("other", "crops", "a_few")]
)
def test_combined_sources_mix_up_neither_people_nor_cameras(root, folder, order):
    register_image_folder("crops", folder)
    register_synthetic_persons("a_few", SPEC)
    register_synthetic_persons("other", OTHER_SPEC)
    data = manager(root, list(order), targets="a_few")
    combined = data.train_loader.dataset.train
    assert len(combined) == 6 + 12 + 4
    assert len(data.fetch_test_loaders("a_few")[0]) > 0

    for which in (1, 2):
        numbers = {}  # of a source's own people or cameras: their numbers in combination
        for dsetid, name in enumerate(order):
            own = manager(root, name, targets=[]).train_loader.dataset.train
            part = [item for item in combined if item[3] == dsetid]
            assert column(part, 0) == column(own, 0)
            for before, after in zip(column(own, which), column(part, which), strict=True):
                if before == -1:
                    assert after == -1
                else:
                    assert numbers.setdefault((name, before), after) == after
        assert -1 not in numbers.values()
        assert len(set(numbers.values())) == len(numbers)


def test_two_image_folders_make_one_training_set(folder):
    register_image_folder("first", folder)
    register_image_folder("second", folder / "lobby")
    data = manager("", ["first", "second"], targets=[])
    cameras = column(data.train_loader.dataset.train, 2)
    assert cameras == [0, 0, 1, 1, -1, -1, -1, -1]
    assert {pid for batch in data.train_loader for pid in batch["pid"].tolist()} == {-1}


def test_unknown_stays_unknown_wherever_it_is_sent():
    for unknown in (UNKNOWN_PID, UNKNOWN_CAMERA):
        assert unknown == -1
        copied = pickle.loads(pickle.dumps(copy.deepcopy(unknown)))
        copied += 7
        assert copied == -1
        assert np.asarray([copied]).tolist() == [-1]


# --- names -------------------------------------------------------------------------------


def test_registering_twice_changes_nothing(registry, folder):
    def register():
        register_datasets()
        register_image_folder("crops", folder, "none")
        register_image_folder("crops", str(folder), "none")
        register_synthetic_persons("a_few", SPEC)

    register()
    first = dict(registry)
    register()
    assert {"imagefolderreid", "syntheticpersons", "crops", "a_few"} <= first.keys()
    assert registry == first


@pytest.mark.parametrize(
    "register",
    [
        lambda: register_synthetic_persons("taken", OTHER_SPEC),
        lambda: register_image_folder("taken"),
        lambda: register_image_folder("market1501"),
    ],
)
def test_taken_name_is_refused(register):
    register_synthetic_persons("taken", SPEC)
    with pytest.raises(ValueError, match="choose another name"):
        register()


def test_no_folder_is_refused_with_both_ways_to_name_one():
    register_datasets()
    with pytest.raises(ValueError, match=r"root=FOLDER .*register_image_folder"):
        manager("", "imagefolderreid")


def test_missing_and_empty_folders_are_named(tmp_path):
    register_image_folder("gone", tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone' does not exist"):
        manager(tmp_path, "gone")
    register_datasets()
    with pytest.raises(ValueError, match="no image files in"):
        manager(tmp_path, "imagefolderreid")

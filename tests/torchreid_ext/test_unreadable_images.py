"""Broken files in torchreid's data sets: at the start, during the training, in the test."""

import shutil
from pathlib import Path

import pytest
import torch

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.engine.image_check import BadImagesError
from selcon_plugin.engine.run import TrainingRun

torchreid = import_torchreid()


@pytest.fixture
def own_root(data_root, tmp_path):
    """The synthetic persons in Market-1501's layout, to damage."""
    root = tmp_path / "datasets"
    (drawn,) = data_root.glob("synthetic_persons*")
    shutil.copytree(drawn, root / "market1501" / "Market-1501-v15.09.15")
    return root


@pytest.fixture
def engine(own_root, make_engine):
    """Make an engine on the copy; without a test set unless there is one named."""

    def make(workers=0, targets=(), **options):
        data = torchreid.data.ImageDataManager(
            root=str(own_root),
            sources="market1501",
            targets=list(targets),
            height=64,
            width=32,
            batch_size_train=8,
            batch_size_test=16,
            workers=workers,
            use_gpu=False,
        )
        return make_engine(datamanager=data, **options)

    return make


def files(root, split):
    (folder,) = root.rglob(split)
    return sorted(folder.glob("*.jpg"))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_of_a_data_set_are_left_out(engine, own_root, caplog, workers):
    train = files(own_root, "bounding_box_train")
    train[3].write_bytes(train[3].read_bytes()[:200])
    train[9].write_bytes(b"")
    loader = engine(workers).train_loader
    names = [Path(path).name for path in loader.dataset.paths]
    assert names == [f.name for i, f in enumerate(train) if i not in (3, 9)]
    assert caplog.text.count("2 of 40 images cannot be read") == 1
    for batch in loader:
        expected = [loader.dataset.paths[i] for i in batch["pid"].tolist()]
        assert list(batch["impath"]) == expected


def test_too_many_broken_files_stop_the_run_before_it_begins(engine, own_root):
    for file in files(own_root, "bounding_box_train")[:3]:
        file.write_bytes(b"")
    with pytest.raises(BadImagesError, match=r"3 of 40 .*0\.05 that max_unreadable_ratio"):
        engine()
    assert len(engine(max_unreadable_ratio=0.1).train_loader.dataset) == 37


@pytest.mark.parametrize("split", ["query", "bounding_box_test"])
def test_broken_test_image_is_refused_before_the_training(engine, own_root, split):
    broken = files(own_root, split)[0]
    broken.write_bytes(b"no image")
    with pytest.raises(BadImagesError, match=rf"test images(.|\n)*{broken.name}"):
        engine(targets=["market1501"])


@pytest.mark.parametrize("method", ["SelectiveContrastive", "ClusterContrast"])
def test_resumed_run_equals_the_unbroken_one_where_files_were_deleted(
    engine, own_root, tmp_path, monkeypatch, caplog, method
):
    gone = [files(own_root, "bounding_box_train")[i] for i in (5, 20)]
    content = {file: file.read_bytes() for file in gone}
    start_epoch = TrainingRun.start_epoch

    def start(run, epoch):
        if epoch == 1:
            for file in gone:
                file.unlink(missing_ok=True)
        start_epoch(run, epoch)

    monkeypatch.setattr(TrainingRun, "start_epoch", start)
    unbroken = engine(method=method)
    unbroken.run(str(tmp_path / "unbroken"), 3)
    assert "can no longer be read" in caplog.text
    assert all(str(file) in caplog.text for file in gone)
    for file in gone:
        file.write_bytes(content[file])
    broken = engine(method=method)
    broken.run(str(tmp_path / "broken"), 2)
    # The part that is resumed reads in processes of its own.
    resumed = engine(workers=2, method=method)
    assert len(resumed.train_loader.dataset) == 38  # what lies there now
    resumed.resume(tmp_path / "broken")
    assert len(resumed.train_loader.dataset) == 40
    resumed.run(str(tmp_path / "broken"), 3)
    expected, found = unbroken.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_run_continues_in_two_worker_processes_where_files_vanish(
    engine, own_root, tmp_path, caplog
):
    trained = engine(workers=2)
    for file in files(own_root, "bounding_box_train")[:2]:
        file.unlink()
    trained.run(str(tmp_path / "run"), 2)
    assert "2 of 40 training images can no longer be read" in caplog.text

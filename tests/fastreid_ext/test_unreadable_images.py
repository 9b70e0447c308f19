"""Broken files in FastReID's data sets: at the start, during the training, in the test."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastreid.engine.train_loop import HookBase
from PIL import Image

from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.engine.image_check import BadImagesError
from selcon_plugin.engine.run import TrainingRun
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.data import build_test_loader, build_train_loader
from selcon_plugin.fastreid_ext.datasets import synthetic_persons_spec
from selcon_plugin.fastreid_ext.embedding import unwrap

CLUSTERS = {
    "MODEL.SELCON.METHOD": "ClusterContrast",
    "MODEL.SELCON.NUM_PARTS": 0,
    "MODEL.SELCON.CLUSTERING.EPS": 0.7,
    "MODEL.SELCON.CLUSTERING.MIN_SAMPLES": 2,
    "MODEL.SELCON.CLUSTERING.K1": 8,
    "MODEL.SELCON.CLUSTERING.K2": 3,
}


@pytest.fixture
def own_root(tiny_cfg, dataset_root, tmp_path, monkeypatch):
    """The synthetic persons in Market-1501's layout, to damage."""
    root = tmp_path / "datasets"
    drawn = generate_synthetic_persons(dataset_root, synthetic_persons_spec(tiny_cfg))
    shutil.copytree(drawn, root / "Market-1501-v15.09.15")
    monkeypatch.setenv("FASTREID_DATASETS", str(root))
    return root


@pytest.fixture
def tiny_cfg(tiny_cfg):
    tiny_cfg.DATASETS.NAMES = tiny_cfg.DATASETS.TESTS = ("Market1501",)
    return tiny_cfg


def files(root, split):
    (folder,) = root.rglob(split)
    return sorted(folder.glob("*.jpg"))


def set_up(cfg, method="SelectiveContrastive", **changes):
    cfg = cfg.clone()
    if method == "ClusterContrast":
        for key in ("NUM_NEIGHBORS", "NUM_NEGATIVES", "WARMUP_EPOCHS"):
            cfg.MODEL.SELCON[key] = None
        for key, value in CLUSTERS.items():
            cfg.merge_from_list([key, value])
    for key, value in {"DATASETS__TESTS": (), **changes}.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return SelConTrainer(cfg)


def run(trainer, resume=False):
    trainer.resume_or_load(resume)
    trainer.train()
    return unwrap(trainer.model).state_dict()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_of_a_data_set_are_left_out(tiny_cfg, own_root, caplog, num_workers):
    train = files(own_root, "bounding_box_train")
    train[3].write_bytes(train[3].read_bytes()[:200])
    train[9].write_bytes(b"")
    tiny_cfg.DATALOADER.NUM_WORKERS = num_workers
    loader = build_train_loader(tiny_cfg)
    names = [Path(path).name for path in loader.dataset.paths]
    assert names == [f.name for i, f in enumerate(train) if i not in (3, 9)]
    assert loader.dataset.num_left_out == 2
    assert caplog.text.count("2 of 40 images cannot be read") == 1
    for batch, _ in zip(loader, range(6), strict=False):
        expected = [loader.dataset.paths[i] for i in batch["targets"].tolist()]
        assert list(batch["img_paths"]) == expected


def test_too_many_broken_files_stop_the_run_before_it_begins(tiny_cfg, own_root):
    for file in files(own_root, "bounding_box_train")[:3]:
        file.write_bytes(b"")
    with pytest.raises(BadImagesError, match=r"3 of 40 .*0\.05 that max_unreadable_ratio"):
        SelConTrainer(tiny_cfg)
    tiny_cfg.MODEL.SELCON.MAX_UNREADABLE_RATIO = 0.1
    assert len(SelConTrainer(tiny_cfg).data_loader.dataset) == 37


@pytest.mark.parametrize("split", ["query", "bounding_box_test"])
def test_broken_test_image_is_refused_before_the_training(tiny_cfg, own_root, split):
    broken = files(own_root, split)[0]
    broken.write_bytes(b"no image")
    with pytest.raises(BadImagesError, match=rf"test images(.|\n)*{broken.name}"):
        SelConTrainer(tiny_cfg)


def test_test_images_are_read_as_training_images_are(tiny_cfg, own_root):
    file = files(own_root, "query")[0]
    values = np.random.default_rng(0).integers(0, 2**16, (64, 32), dtype=np.uint16)
    Image.fromarray(values).save(file, format="png")  # FastReID's reader shows it white
    loader, _ = build_test_loader(tiny_cfg, "Market1501")
    sample = next(s for s in loader.dataset if s["img_paths"] == str(file))
    assert torch.equal(sample["images"], loader.dataset.transform(read_rgb(file)))
    assert set(sample) == {"images", "targets", "camids", "img_paths"}


@pytest.fixture
def deleted_in_second_epoch(own_root, monkeypatch):
    """Delete two files when the second epoch begins, in whichever run."""
    gone = [files(own_root, "bounding_box_train")[i] for i in (5, 20)]
    kept = {file: file.read_bytes() for file in gone}
    start_epoch = TrainingRun.start_epoch

    def start(run, epoch):
        if epoch == 1:
            for file in gone:
                file.unlink(missing_ok=True)
        start_epoch(run, epoch)

    monkeypatch.setattr(TrainingRun, "start_epoch", start)
    return kept


@pytest.mark.parametrize("method", ["SelectiveContrastive", "ClusterContrast"])
def test_resumed_run_equals_the_unbroken_one_where_files_were_deleted(
    tiny_cfg, tmp_path, deleted_in_second_epoch, caplog, method
):
    changes = {"SOLVER__MAX_EPOCH": 3}
    unbroken = run(set_up(tiny_cfg, method, **changes))
    assert caplog.text.count("can no longer be read") >= 1
    for file, content in deleted_in_second_epoch.items():
        assert str(file) in caplog.text
        file.write_bytes(content)
    changes["OUTPUT_DIR"] = str(tmp_path / "broken")
    trainer = set_up(tiny_cfg, method, **changes)
    trainer.resume_or_load(False)
    trainer.max_epoch = 2  # it stops after its second epoch, as if killed there
    trainer.train()
    (tmp_path / "broken" / "model_final.pth").unlink(missing_ok=True)
    (tmp_path / "broken" / "last_checkpoint").write_text("model_0000.pth")
    trainer = set_up(tiny_cfg, method, **changes)
    assert len(trainer.data_loader.dataset) == 38  # what lies there now
    own = HookBase()
    trainer.register_hooks([own])
    num_hooks = len(trainer._hooks)
    resumed = run(trainer, resume=True)
    assert trainer._hooks[-1] is own  # it is not lost with the trainer of 38 images
    assert len(trainer._hooks) == num_hooks
    assert len(trainer.data_loader.dataset) == 40
    assert trainer.start_epoch == 1
    assert unbroken.keys() == resumed.keys()
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name]), name


def test_run_stops_where_too_many_files_are_deleted(tiny_cfg, deleted_in_second_epoch):
    with pytest.raises(BadImagesError, match=r"2 of 40 images"):
        run(set_up(tiny_cfg, MODEL__SELCON__MAX_UNREADABLE_RATIO=0.03, SOLVER__MAX_EPOCH=3))


def test_run_writes_the_list_of_its_images(tiny_cfg, own_root):
    trainer = set_up(tiny_cfg, SOLVER__MAX_EPOCH=1)
    run(trainer)
    content = json.loads((Path(tiny_cfg.OUTPUT_DIR) / "images.json").read_text())
    dataset = trainer.data_loader.dataset
    assert [row[0] for row in content["images"]] == dataset.paths
    assert [row[1] for row in content["images"]] == [
        os.path.getsize(p) for p in dataset.paths
    ]

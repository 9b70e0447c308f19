"""Methods that cluster, trained through FastReID: what follows from new labels."""

import json
import logging
from pathlib import Path

import pytest
import torch
from fastreid.config import get_cfg
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.engine.train_loop import HookBase

from selcon_plugin.clustering import labeler_options
from selcon_plugin.config.loading import Merger
from selcon_plugin.fastreid_ext import (
    SelConTrainer,
    SyntheticPersons,
    add_selcon_config,
)
from selcon_plugin.fastreid_ext.config import KEYS
from selcon_plugin.fastreid_ext.embedding import extract_training_set, unwrap

# Clusters are found on 40 images in the features of a random network.
CLUSTERED = {
    "MODEL.SELCON.METHOD": "ClusterContrast",
    "MODEL.SELCON.CLUSTERING.EPS": 0.7,
    "MODEL.SELCON.CLUSTERING.MIN_SAMPLES": 2,
    "MODEL.SELCON.CLUSTERING.K1": 8,
    "MODEL.SELCON.CLUSTERING.K2": 3,
    "DATALOADER.NUM_INSTANCE": 4,
    "SOLVER.OPT": "Adam",
    "SOLVER.BASE_LR": 0.002,
}
METHODS = {
    "ClusterContrast": {},
    "ClusterContrast hard": {"CLUSTER_UPDATE": "hard", "CAMERA_WEIGHT": "batch"},
    "SelConCluster": {"METHOD": "SelConCluster", "OUTLIER_RATIO": 0.5, "NUM_NEIGHBORS": 3},
    "SCL jaccard": {"METHOD": "SelectiveContrastive", "SELECTION": "jaccard"},
    "SCL cluster": {"METHOD": "SelectiveContrastive", "SELECTION": "cluster"},
}


def configured(cfg, values):
    cfg = cfg.clone()
    Merger(cfg, KEYS).merge_overrides(values)
    return cfg


def with_method(cfg, name):
    cfg = configured(cfg, CLUSTERED)
    if not name.startswith("ClusterContrast"):
        cfg.MODEL.SELCON.NUM_NEGATIVES = 10
    else:
        # Keys of other methods, set by the tiny config, are refused here.
        defaults = add_selcon_config(get_cfg()).MODEL.SELCON
        for key in ("NUM_NEIGHBORS", "NUM_NEGATIVES", "WARMUP_EPOCHS"):
            cfg.MODEL.SELCON[key] = defaults[key]
    options = {f"MODEL.SELCON.{key}": value for key, value in METHODS[name].items()}
    return configured(cfg, options)


def train(cfg, resume=False, hooks=(), **changes):
    cfg = configured(cfg, {k.replace("__", "."): v for k, v in changes.items()})
    trainer = SelConTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.register_hooks(list(hooks))
    trainer.train()
    return trainer


def assert_equal_states(first, second):
    first, second = (unwrap(trainer.model).state_dict() for trainer in (first, second))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@DATASET_REGISTRY.register()
class SwappedIdentities(SyntheticPersons):
    """The same images with identities reassigned: nothing may depend on them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        pids = [pid for _, pid, _ in self.train]
        self._train = [
            (path, pids[(7 * i + 3) % len(pids)], camid)
            for i, (path, _, camid) in enumerate(self.train)
        ]


class BatchRecorder(HookBase):
    """Keeps the images and labels of every batch."""

    def __init__(self):
        self.batches = []

    def before_epoch(self):
        self.labels = unwrap(self.trainer.model).method.labels.clone()

    def before_step(self):
        model = unwrap(self.trainer.model)
        forward = type(model.method).loss

        def loss(embeddings, index, camids):
            self.batches.append((self.trainer.epoch, index.clone(), self.labels[index]))
            return forward(model.method, embeddings, index, camids)

        model.method.loss = loss


@pytest.mark.parametrize("name", METHODS)
def test_training_is_blind_to_identities(tiny_cfg, tmp_path, name):
    cfg = with_method(tiny_cfg, name)
    true = train(cfg)
    swapped = train(
        cfg, DATASETS__NAMES=("SwappedIdentities",), OUTPUT_DIR=str(tmp_path / "swapped")
    )
    pids = [trainer.data_loader.dataset.evaluation_only_pids for trainer in (true, swapped)]
    assert pids[0] != pids[1]
    assert unwrap(true.model).method.labels.max() > 0  # it did cluster
    assert_equal_states(true, swapped)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("period", [1, 3])
def test_resumed_run_equals_the_unbroken_one(tiny_cfg, tmp_path, name, period):
    cfg = configured(
        with_method(tiny_cfg, name),
        {"MODEL.SELCON.CLUSTERING.PERIOD": period, "SOLVER.MAX_EPOCH": 4},
    )
    unbroken = train(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "broken")
    trainer = SelConTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.max_epoch = 3
    trainer.train()
    (tmp_path / "broken" / "model_final.pth").unlink()
    (tmp_path / "broken" / "last_checkpoint").write_text("model_0001.pth")
    resumed = train(cfg, resume=True)
    assert resumed.start_epoch == 2  # with period 3 in the middle of one
    assert_equal_states(unbroken, resumed)


def test_batches_are_sampled_from_the_labels_of_their_epoch(tiny_cfg):
    recorder = BatchRecorder()
    train(with_method(tiny_cfg, "ClusterContrast"), hooks=[recorder], SOLVER__MAX_EPOCH=3)
    assert len(recorder.batches) == 15
    labels_by_epoch = {}
    for epoch, index, labels in recorder.batches:
        assert (labels >= 0).all()  # outliers are left out
        blocks = labels.reshape(2, 4)
        assert (blocks == blocks[:, :1]).all()
        assert blocks[0, 0] != blocks[1, 0]
        labels_by_epoch.setdefault(epoch, []).append((index, labels))
    assert set(labels_by_epoch) == {0, 1, 2}


def test_outliers_take_part_by_their_quota(tiny_cfg):
    recorder = BatchRecorder()
    cfg = configured(
        with_method(tiny_cfg, "SelConCluster"), {"MODEL.SELCON.CLUSTERING.EPS": 0.4}
    )
    trainer = train(cfg, hooks=[recorder])
    assert (unwrap(trainer.model).method.labels < 0).any()
    quotas = {int((labels < 0).sum()) for _, _, labels in recorder.batches}
    assert max(quotas) == 4  # 0 in an epoch without outliers


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("eps", "k1", "fragments"), [(1e-6, 8, "No cluster was"), (1.0, 40, "One cluster was")]
)
def test_impossible_eps_ends_well(tiny_cfg, name, eps, k1, fragments, caplog):
    caplog.set_level(logging.WARNING)
    cfg = with_method(tiny_cfg, name)
    cfg.MODEL.SELCON.CLUSTERING.EPS = eps
    cfg.MODEL.SELCON.CLUSTERING.K1 = k1
    cfg.MODEL.SELCON.CLUSTERING.MIN_SAMPLES = 30
    trainer = train(cfg)
    method = unwrap(trainer.model).method
    assert method.instance_level
    assert method.step == 2 * trainer.iters_per_epoch
    assert fragments in caplog.text
    assert trainer._last_eval_results["mAP"] > 0


def test_quality_reaches_the_writers(tiny_cfg):
    trainer = train(with_method(tiny_cfg, "ClusterContrast"), SOLVER__MAX_EPOCH=3)
    lines = (Path(tiny_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    assert all("checksum" in json.loads(line) for line in lines)
    last = {key: value for line in lines for key, value in json.loads(line).items()}
    label_free = {"num_clusters", "outlier_ratio", "silhouette", "stability", "eps"}
    identity_known = {"purity", "ami", "pair_precision", "pair_recall"}
    times = {"extraction_seconds", "clustering_seconds"}
    assert label_free | identity_known | times <= last.keys()
    method = unwrap(trainer.model).method
    assert last["num_clusters"] == method.labels.max() + 1
    history = trainer.storage.history("num_clusters").values()
    assert len(history) == 3  # one report an epoch


def test_images_without_known_identities_train_and_report_no_purity(tiny_cfg, dataset_root):
    cfg = with_method(tiny_cfg, "ClusterContrast")
    folder = next(dataset_root.rglob("bounding_box_train"))
    cfg.DATASETS.IMAGE_FOLDER.ROOT = str(folder)
    train(cfg, DATASETS__NAMES=("ImageFolderReID",), DATASETS__TESTS=())
    text = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text()
    assert "num_clusters" in text
    assert "purity" not in text


def test_iterations_per_epoch_are_an_option(tiny_cfg):
    trainer = train(
        with_method(tiny_cfg, "ClusterContrast"), MODEL__SELCON__ITERS_PER_EPOCH=7
    )
    assert trainer.iter == 14


@pytest.mark.parametrize("labeler", ["KMeans", "HDBSCAN", "Agglomerative", "Ensemble"])
def test_every_labeler_trains(tiny_cfg, labeler):
    cfg = with_method(tiny_cfg, "ClusterContrast")
    cfg.MODEL.SELCON.CLUSTERING.LABELER = labeler
    known = labeler_options(labeler)
    defaults = add_selcon_config(get_cfg()).MODEL.SELCON.CLUSTERING
    for key in ("EPS", "MIN_SAMPLES", "K1", "K2"):
        if key.lower() not in known:
            cfg.MODEL.SELCON.CLUSTERING[key] = defaults[key]
    if labeler == "KMeans":
        cfg.MODEL.SELCON.CLUSTERING.NUM_CLUSTERS = 6
    trainer = train(cfg)
    assert unwrap(trainer.model).method.step == 10


def test_labels_of_the_fused_feature(tiny_cfg):
    cfg = with_method(tiny_cfg, "SelConCluster")
    trainer = train(cfg, MODEL__SELCON__CLUSTERING__FEATURES="fused")
    assert unwrap(trainer.model).method.step == 10


def test_teacher_clusters_and_is_tested(tiny_cfg):
    cfg = configured(
        with_method(tiny_cfg, "ClusterContrast"), {"MODEL.SELCON.EMA_DECAY": 0.9}
    )
    trainer = train(cfg)
    model = unwrap(trainer.model)
    images = torch.rand(3, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 255
    model.eval()
    teacher = model.embed(images).global_features
    student = model.embed(images, student=True).global_features
    assert not torch.allclose(teacher, student, atol=1e-3)
    dataset = trainer.data_loader.dataset
    extracted = extract_training_set(cfg, model, dataset).global_features
    model.teacher = None
    without = extract_training_set(cfg, model, dataset).global_features
    assert not torch.allclose(extracted, without, atol=1e-3)


def test_resumed_teacher_equals_the_unbroken_one(tiny_cfg, tmp_path):
    cfg = configured(
        with_method(tiny_cfg, "ClusterContrast"),
        {"MODEL.SELCON.EMA_DECAY": 0.9, "SOLVER.MAX_EPOCH": 3},
    )
    unbroken = train(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "broken")
    trainer = SelConTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.max_epoch = 2
    trainer.train()
    (tmp_path / "broken" / "model_final.pth").unlink()
    (tmp_path / "broken" / "last_checkpoint").write_text("model_0000.pth")
    assert_equal_states(unbroken, train(cfg, resume=True))


def test_reliability_threshold_survives_a_checkpoint(tiny_cfg):
    cfg = with_method(tiny_cfg, "ClusterContrast")
    cfg.MODEL.SELCON.CLUSTERING.RELIABILITY = True
    trainer = train(cfg)
    remembered = trainer.labeler.state_dict()
    assert any(remembered.values())
    again = SelConTrainer(cfg)
    again.resume_or_load(True)
    assert again.labeler.state_dict() == remembered


def test_ghost_batches_reach_backbone_and_head(tiny_cfg):
    cfg = configured(
        with_method(tiny_cfg, "SelConCluster"),
        {"MODEL.SELCON.GHOST_BATCH_SIZE": 4, "MODEL.HEADS.WITH_BNNECK": True},
    )
    trainer = train(cfg)
    model = unwrap(trainer.model)
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        and "Ghost" not in type(module).__name__
    ]
    assert not plain


def test_micro_batches_equal_the_ghost_batches_of_a_whole_one(tiny_cfg, tmp_path):
    """A batch of 8 whose norms see groups of 4 is the same in two parts of 4."""
    cfg = configured(
        with_method(tiny_cfg, "ClusterContrast"), {"MODEL.SELCON.GHOST_BATCH_SIZE": 4}
    )
    losses = {1: [], 2: []}
    for num_parts, found in losses.items():

        class Recorder(HookBase):
            def after_step(self, found=found):
                found.append(self.trainer.storage.latest()["total_loss"][0])

        train(
            cfg,
            hooks=[Recorder()],
            SOLVER__MAX_EPOCH=1,
            MODEL__SELCON__MICRO_BATCHES=num_parts,
            OUTPUT_DIR=str(tmp_path / str(num_parts)),
        )
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("MODEL.SELCON.CLUSTERING.EPS", 1.5, r"CLUSTERING\.EPS .*<= 1 or 'auto'"),
        ("MODEL.SELCON.CLUSTERING.EPS", "often", r"CLUSTERING\.EPS .*'often'"),
        ("MODEL.SELCON.CLUSTERING.LABELER", "Magic", r"LABELER .*'DBSCAN'"),
        ("MODEL.SELCON.CLUSTERING.NUM_CLUSTERS", 7, r"labeler DBSCAN has no such option"),
        ("MODEL.SELCON.MICRO_BATCHES", 3, r"IMS_PER_BATCH \(8\) must be a multiple"),
        ("DATALOADER.NUM_INSTANCE", 3, r"cluster \(3\).*keys .*DATALOADER\.NUM_INSTANCE"),
        ("MODEL.SELCON.SAMPLER", "random", r"SAMPLER .*'pk_camera'"),
        ("MODEL.SELCON.SELECTION", "jaccard", r"method ClusterContrast has no such"),
    ],
)
def test_wrong_settings_end_before_training(tiny_cfg, key, value, fragments):
    cfg = with_method(tiny_cfg, "ClusterContrast")
    with pytest.raises(ValueError, match=fragments):
        SelConTrainer(configured(cfg, {key: value}))


def test_sampler_of_clusters_needs_a_method_that_clusters(tiny_cfg):
    tiny_cfg.MODEL.SELCON.SAMPLER = "pk"
    with pytest.raises(ValueError, match=r"SAMPLER pk samples from clusters.*auto"):
        SelConTrainer(tiny_cfg)

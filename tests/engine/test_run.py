"""Steps of a method along any host's training loop, and metadata of a run."""

import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from selcon_plugin.clustering import Labeler, PseudoLabels
from selcon_plugin.engine.batches import build_sampler
from selcon_plugin.engine.best_weights import BestWeights
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.engine.run import TrainingRun, seed_all
from selcon_plugin.engine.run_options import ClusteringOptions, RunOptions
from selcon_plugin.features import Embeddings, GlobalPartEmbedding
from selcon_plugin.methods import Method
from selcon_plugin.metrics.identities import cluster_diagnostics
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.runs.state import RunState

IMAGES, BATCH = 12, 4


class Recorded(Method):
    """A method that notes what it is told."""

    def __init__(self, *, clusters=False, bank=None):
        super().__init__(IMAGES, 8)
        self.needs_clusters = clusters
        self.calls = []
        self.bank = bank

    def start_epoch(self, epoch):
        super().start_epoch(epoch)
        self.calls.append(("epoch", epoch))

    def clustering_features(self):
        return self.bank

    def prepare(self, embeddings, camids, pseudo_labels=None):
        if self.needs_clusters:
            self._set_labels(pseudo_labels)
        self.calls.append(("prepare", embeddings, camids))
        self._finish_prepare()

    def loss(self, embeddings, index, camids, *views):
        return {"loss": embeddings.global_features.square().sum()}

    def update(self, index, embeddings):
        self.calls.append(("update", index))
        self._finish_update()

    def selected_positives(self):
        return torch.tensor([0, 1]), torch.tensor([[4], [2]])

    def diagnostics(self):
        return {"bank_agreement": 0.5}


class Scripted(Labeler):
    """Gives labels that a test sets, and notes what it was given."""

    def __init__(self, labels):
        self.labels = labels
        self.given = []

    def cluster(self, features):
        self.given.append(features)
        return PseudoLabels.numbered(self.labels, measured={"eps": 0.5})


LABELS = [0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1]


@pytest.fixture
def make_run():
    """Make a run around a small network."""

    def make(method, labeler=None, *, planner="stream", pids=None, teacher=0.0, **options):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        network = EmbeddingNetwork(
            backbone,
            GlobalPartEmbedding(8, 8, 2),
            Preprocessing(pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3),
            images_normalized=True,
        )
        network.method = method
        network.add_teacher(teacher)
        pids = range(4) if pids is None else pids
        items = [(f"{i:02}", pids[i % len(pids)], i % 3) for i in range(IMAGES)]
        run = TrainingRun(
            network,
            IndexedImages(items, str, None),
            build_sampler(planner, IMAGES, batch_size=BATCH, num_instances=2),
            labeler,
            extract=lambda: (
                run.extracted.append(features(len(run.extracted))) or run.extracted[-1]
            ),
            calibrate=lambda: run.method.calls.append(("calibrate",)),
            **options,
        )
        run.extracted = []
        return run

    return make


def test_what_a_clustering_takes_is_said_before_training(make_run, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        make_run(Recorded(clusters=True), Scripted(LABELS)).before_training()
    assert "Each clustering of 12 images takes about" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_run(Recorded()).before_training()
    assert "Each clustering" not in caplog.text
    monkeypatch.setattr("selcon_plugin.engine.estimates.available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="clustering 12 images needs about"):
        make_run(Recorded(clusters=True), Scripted(LABELS)).before_training()


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = nn.functional.normalize(torch.randn(IMAGES, 8, generator=generator), dim=1)
    parts = torch.randn(IMAGES, 2, 4, generator=generator)
    return Embeddings(vectors, nn.functional.normalize(parts, dim=2))


def names(method):
    return [call[0] for call in method.calls]


def one_step(run, index):
    images = torch.randn(len(index), 3, 16, 8)
    camids = torch.zeros(len(index), dtype=torch.int64)
    sum(run.network.losses(images, torch.tensor(index), camids).values()).backward()
    run.after_step()


# --- before training ---------------------------------------------------------------------


def test_banks_are_prepared_once_before_training(make_run):
    run = make_run(Recorded())
    run.before_training()
    run.before_training()
    assert names(run.method) == ["calibrate", "prepare"]
    _, embeddings, camids = run.method.calls[1]
    assert embeddings is run.extracted[0]
    assert camids.tolist() == [i % 3 for i in range(IMAGES)]


def test_method_that_clusters_is_prepared_with_its_first_clusters(make_run):
    run = make_run(Recorded(clusters=True), Scripted(LABELS), planner="pk")
    run.before_training()
    assert names(run.method) == ["calibrate"]
    assert not run.method.prepared


def test_teacher_begins_with_the_weights_there_are(make_run):
    run = make_run(Recorded(), teacher=0.9)
    for parameter in run.network.backbone.parameters():
        parameter.data.add_(1.0)  # loaded after the teacher was made
    run.before_training()
    pairs = zip(
        run.network.teacher.module["backbone"].parameters(),
        run.network.backbone.parameters(),
        strict=True,
    )
    assert all(torch.equal(first, second) for first, second in pairs)
    assert run.network.teacher.step == 0


# --- epochs ------------------------------------------------------------------------------


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_epoch_has_its_own_random_streams(make_run):
    def streams(seed, epoch):
        run = make_run(Recorded(), options=RunOptions(seed=seed))
        seed_all(99)
        run.start_epoch(epoch)
        assert run.method.epoch == epoch
        return drawn()

    assert streams(0, 3) == streams(0, 3)
    for other in (streams(0, 4), streams(1, 3)):
        assert all(a != b for a, b in zip(streams(0, 3), other, strict=True))


def test_processes_have_random_streams_of_their_own(make_run, monkeypatch):
    found = []
    for rank in (0, 1):
        monkeypatch.setattr("selcon_plugin.engine.run.rank", lambda rank=rank: rank)
        make_run(Recorded()).start_epoch(2)
        found.append(drawn())
    assert found[0] != found[1]


def test_batches_begin_where_the_epoch_does(make_run):
    run = make_run(Recorded())
    run.refresh_pseudo_labels(2, 6)
    assert run.sampler.start == 6
    assert next(iter(run.sampler)).position == 6 * BATCH


@pytest.mark.parametrize(
    ("period", "epochs"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (9, [0])]
)
def test_clusters_are_refreshed_every_few_epochs(make_run, period, epochs):
    labeler = Scripted(LABELS)
    run = make_run(
        Recorded(clusters=True),
        labeler,
        planner="pk",
        clustering=ClusteringOptions(period=period),
    )
    clustered = []
    for epoch in range(4):
        before = len(labeler.given)
        run.refresh_pseudo_labels(epoch, 3 * epoch)
        clustered += [epoch] * (len(labeler.given) - before)
    assert clustered == epochs


def test_run_that_was_never_prepared_clusters_at_once(make_run):
    labeler = Scripted(LABELS)
    run = make_run(
        Recorded(clusters=True),
        labeler,
        planner="pk",
        clustering=ClusteringOptions(period=3),
    )
    run.refresh_pseudo_labels(1, 3)
    assert len(labeler.given) == 1
    assert run.method.labels.tolist() == LABELS


def test_batches_are_sampled_from_the_new_labels(make_run):
    labeler = Scripted(LABELS)
    run = make_run(Recorded(clusters=True), labeler, planner="pk")
    for epoch, labels in enumerate((LABELS, LABELS[::-1])):
        labeler.labels = labels
        run.refresh_pseudo_labels(epoch, 3 * epoch)
        batch = next(run.sampler.batches(3 * epoch))
        found = run.method.labels[torch.as_tensor(batch)].reshape(2, 2)
        assert (found >= 0).all()
        assert (found == found[:, :1]).all()


def test_without_clusters_every_image_is_sampled(make_run, caplog):
    run = make_run(Recorded(clusters=True), Scripted([-1] * IMAGES), planner="pk")
    run.refresh_pseudo_labels(0, 0)
    assert run.method.instance_level
    batches = run.sampler.batches(0)
    seen = np.concatenate([next(batches) for _ in range(IMAGES // BATCH)])
    assert sorted(seen.tolist()) == list(range(IMAGES))
    assert "No cluster was found" in caplog.text


def test_batch_that_needs_more_clusters_falls_back(make_run):
    run = make_run(Recorded(clusters=True), Scripted(LABELS), planner="pk", min_clusters=3)
    run.refresh_pseudo_labels(0, 0)
    assert run.method.instance_level


@pytest.mark.parametrize("kind", ["global", "fused"])
def test_clustered_features(make_run, kind):
    labeler = Scripted(LABELS)
    run = make_run(
        Recorded(clusters=True),
        labeler,
        planner="pk",
        clustering=ClusteringOptions(features=kind),
    )
    run.refresh_pseudo_labels(0, 0)
    (embeddings,) = run.extracted
    expected = {
        "global": embeddings.global_features,
        "fused": run.network.test_feature(embeddings),
    }
    assert torch.allclose(labeler.given[0], expected[kind], atol=1e-6)
    assert run.method.calls[-1][1] is embeddings


def test_method_may_cluster_its_own_bank(make_run):
    bank = features(7).global_features
    labeler = Scripted(LABELS)
    run = make_run(Recorded(clusters=True, bank=bank), labeler, planner="pk")
    run.refresh_pseudo_labels(0, 0)  # its bank is empty as yet: features are extracted
    assert len(run.extracted) == 1
    run.refresh_pseudo_labels(1, 3)
    assert len(run.extracted) == 1
    assert torch.allclose(labeler.given[1], bank, atol=1e-6)


def test_clustering_is_reported(make_run, caplog):
    caplog.set_level(logging.INFO)
    reports = []
    labeler = Scripted(LABELS)
    pids = [0, 0, 1, 2]
    run = make_run(
        Recorded(clusters=True), labeler, planner="pk", pids=pids, report=reports.append
    )
    run.refresh_pseudo_labels(0, 0)
    run.refresh_pseudo_labels(1, 3)
    first, second = reports
    assert first["num_clusters"] == 2
    assert first["eps"] == 0.5
    assert first["outlier_ratio"] == pytest.approx(1 / 3)
    assert first["clustering_seconds"] >= 0
    assert "stability" not in first
    assert second["stability"] == 1  # the same labels again
    expected = cluster_diagnostics(
        run.method.labels, run.dataset.evaluation_only_identities
    )
    for name, value in expected.items():
        assert first[name] == pytest.approx(value)
    assert "Epoch 2: " in caplog.text


def test_what_is_undefined_is_left_out_of_the_report(make_run):
    reports = []
    labeler = Scripted([-1] * IMAGES)
    run = make_run(Recorded(clusters=True), labeler, planner="pk", report=reports.append)
    run.refresh_pseudo_labels(0, 0)
    assert all(value == value for value in reports[0].values())  # not NaN


def test_identities_that_are_not_known_are_not_reported(make_run):
    reports = []
    run = make_run(
        Recorded(clusters=True),
        Scripted(LABELS),
        planner="pk",
        pids=[-1],
        report=reports.append,
    )
    run.refresh_pseudo_labels(0, 0)
    assert "num_clusters" in reports[0]
    assert "purity" not in reports[0]
    assert "neighbor_precision" not in run.diagnostics()


# --- steps -------------------------------------------------------------------------------


def test_step_writes_banks_and_moves_the_teacher(make_run):
    run = make_run(Recorded(), teacher=0.9)
    run.before_training()
    one_step(run, [3, 1])
    name, index = run.method.calls[-1]
    assert (name, index.tolist()) == ("update", [3, 1])
    assert run.method.step == run.network.teacher.step == 1
    with pytest.raises(RuntimeError, match="must follow a training step"):
        run.after_step()


def test_micro_batches_are_written_together(make_run):
    run = make_run(Recorded())
    images, camids = torch.randn(2, 3, 16, 8), torch.zeros(2, dtype=torch.int64)
    for index in ([3, 1], [5, 0]):
        run.network.losses(images, torch.tensor(index), camids)
    run.after_step()
    assert run.method.calls[-1][1].tolist() == [3, 1, 5, 0]
    assert run.method.step == 1


def test_diagnostics_know_identities_where_there_are_any(make_run):
    run = make_run(Recorded())  # image i shows person i % 4: of 0-4 and 1-2 one matches
    assert run.diagnostics() == {"bank_agreement": 0.5, "neighbor_precision": 0.5}


# --- what a run is -----------------------------------------------------------------------


def test_metadata_of_a_run_survive_a_checkpoint():
    state = RunState(num_images=40, seed=0, method="Mine")
    saved = state.state_dict()
    assert saved == {"num_images": 40, "seed": 0, "method": "Mine"}
    RunState(num_images=40, seed=0, method="Mine").load_state_dict(saved)
    saved["seed"] = 9  # a copy
    assert state.metadata["seed"] == 0


def test_run_with_other_metadata_is_refused_with_all_of_them():
    saved = RunState(num_images=40, seed=0, method="Mine").state_dict()
    with pytest.raises(
        ValueError,
        match="resume: num_images was 40 and is 50; method was 'Mine' and is 'Your'",
    ):
        RunState(num_images=50, seed=0, method="Your").load_state_dict(saved)


def test_metadata_that_older_checkpoints_lack_is_no_difference():
    RunState(num_images=40, batch_size=8).load_state_dict({"num_images": 40})


# --- the best weights --------------------------------------------------------------------


def clustered_run(make_run, saved, criterion="stability"):
    labeler = Scripted(torch.tensor(LABELS))
    best = BestWeights(criterion, lambda epochs, _state: saved.append(epochs))
    run = make_run(Recorded(clusters=True), labeler, planner="shuffle", best=best)
    run.before_training()
    return run, labeler


def test_clusters_score_the_weights_of_the_epoch_before(make_run):
    saved = []
    run, labeler = clustered_run(make_run, saved)
    halves = [0, 0, 1, 1, 0, 0, 1, 1, -1, -1, -1, -1]
    # Before each epoch, and after the last; equal to the ones before at epochs 1 and 3.
    for epoch, labels in enumerate([LABELS, LABELS, halves, halves]):
        labeler.labels = torch.tensor(labels)
        run.refresh_pseudo_labels(epoch, 0)
        one_step(run, [0, 1, 2, 3])
        run.end_epoch(epoch)
    assert saved == [1]
    run.best.value = 0.5
    run.score_final_epoch(4)
    assert saved == [1, 4]
    assert len(labeler.given) == 5


def test_untrained_weights_are_never_the_best(make_run):
    saved = []
    run, _ = clustered_run(make_run, saved, "outlier_ratio")
    run.refresh_pseudo_labels(0, 0)
    assert saved == []


def test_one_cluster_of_all_images_is_never_the_best(make_run, monkeypatch):
    monkeypatch.setattr("selcon_plugin.metrics.collapse._MIN_IMAGES", len(LABELS))
    saved = []
    run, labeler = clustered_run(make_run, saved, "outlier_ratio")
    collapsed = [0] * (len(LABELS) - 1) + [1]
    for epoch, labels in enumerate([LABELS, LABELS, collapsed]):
        labeler.labels = torch.tensor(labels)
        run.refresh_pseudo_labels(epoch, 0)
        one_step(run, [0, 1, 2, 3])
        run.end_epoch(epoch)
    run.score_final_epoch(3)
    assert saved == [1]


def test_best_weights_need_clusters(make_run, caplog):
    saved = []
    run = make_run(Recorded(), best=BestWeights("silhouette", saved.append))
    assert "keep_best_by silhouette is a criterion of clusters" in caplog.text
    run.before_training()
    one_step(run, [0, 1, 2, 3])
    run.end_epoch(0)
    run.score_final_epoch(1)
    assert saved == []

"""``ImageSelConEngine``: whole runs on torchreid's own data manager, tiny and real."""

import copy
import itertools
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selcon_plugin.clustering import DBSCANLabeler
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.engine.batches import split_batch
from selcon_plugin.methods import base, register_method
from selcon_plugin.methods.cluster_contrast import ClusterContrast
from selcon_plugin.options import Interval
from selcon_plugin.samplers.stream import StreamSampler
from selcon_plugin.torchreid_ext import (
    ImageSelConEngine,
    SelConModel,
    build_selcon_model,
    register_image_folder,
    register_synthetic_persons,
)

torchreid = import_torchreid()

METHODS = ["SelectiveContrastive", "ClusterContrast", "SelConCluster"]
CLUSTERING = {"eps": 0.7, "min_samples": 2, "k1": 8, "k2": 3}
BATCH, IMAGES = 8, 40


def run(engine, folder, epochs=2, **arguments):
    engine.run(save_dir=str(folder), max_epoch=epochs, **arguments)
    return engine


def network_of(engine):
    model = engine.model
    return model.module if isinstance(model, nn.DataParallel) else model


def state_of(engine):
    return network_of(engine).state_dict()


def assert_equal_states(first, second):
    first, second = state_of(first), state_of(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_states_differ(first, second, name="heads.global_projection.weight"):
    assert not torch.equal(state_of(first)[name], state_of(second)[name])


def checkpoints_in(folder):
    return sorted(file.name for file in (folder / "model").iterdir())


def record_losses(engine):
    """Keep what every step returns."""
    found, step = [], engine.forward_backward

    def recorded(batch):
        found.append(step(batch))
        return found[-1]

    engine.forward_backward = recorded
    return found


class Scalars:
    """Stands in for TensorBoard's writer."""

    def __init__(self):
        self.found = {}

    def add_scalar(self, name, value, step):
        self.found.setdefault(name, {})[step] = float(value)

    def close(self):
        pass


def plain_model(*, parallel=False, scheduler="cosine", **options):
    """A torchreid model with its classifier, as a script for identities has it."""
    torch.manual_seed(0)
    model = torchreid.models.build_model("osnet_x0_25", num_classes=8, pretrained=False)
    if parallel:
        model = nn.DataParallel(model)
    optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=0.02, **options)
    schedule = None
    if scheduler:
        schedule = torchreid.optim.build_lr_scheduler(
            optimizer,
            lr_scheduler=scheduler,
            stepsize=[1, 2] if scheduler == "multi_step" else 1,
            max_epoch=2,
        )
    return model, optimizer, schedule


@pytest.fixture
def adopt(manager):
    """Make an engine around a plain model."""

    def make(*, datamanager=None, parallel=False, scheduler="cosine", **options):
        built = plain_model(parallel=parallel, scheduler=scheduler)
        head = options.pop("head", {"num_parts": 2})
        return ImageSelConEngine(
            datamanager or manager(),
            *built,
            method="ClusterContrast",
            clustering=CLUSTERING,
            use_gpu=False,
            head=head,
            **options,
        )

    return make


@pytest.fixture
def folder_source(data_root):
    """The training images without identities and cameras, as a source of torchreid."""
    (folder,) = data_root.rglob("bounding_box_train")
    register_image_folder("crops", folder)
    return "crops"


# --- training ----------------------------------------------------------------------------


def test_training_changes_weights_and_fills_banks(make_engine, tmp_path):
    engine = make_engine()
    before = {name: value.clone() for name, value in state_of(engine).items()}
    run(engine, tmp_path)
    network = network_of(engine)
    unchanged = [
        name for name, p in network.named_parameters() if torch.equal(before[name], p)
    ]
    assert not unchanged
    assert network.method.step == 2 * (IMAGES // BATCH)
    memory = network.method.memory
    assert torch.allclose(memory.global_bank.norm(dim=1), torch.ones(IMAGES), atol=1e-5)
    assert memory.mixture_bank.any(dim=1).all()


@pytest.mark.parametrize("method", METHODS)
def test_training_is_blind_to_identities(make_engine, manager, tmp_path, method):
    shuffled = manager()
    dataset = shuffled.train_loader.dataset
    pids = [item[1] for item in dataset.train]
    dataset.train = [
        (path, pids[(7 * i + 3) % len(pids)], *others)
        for i, (path, _, *others) in enumerate(dataset.train)
    ]
    assert [item[1] for item in dataset.train] != pids
    options = {"method": method, "diagnostics_period": 1, "iters_per_epoch": 3}
    true = run(make_engine(**options), tmp_path / "true")
    blind = run(make_engine(datamanager=shuffled, **options), tmp_path / "shuffled")
    assert_equal_states(true, blind)
    known = [engine.train_loader.dataset.evaluation_only_pids for engine in (true, blind)]
    assert known[0] != known[1]


def test_same_seed_same_run_other_seed_other_run(make_engine, tmp_path):
    first, second, other = (
        run(make_engine(method="ClusterContrast", seed=seed), tmp_path / str(i), 1)
        for i, seed in enumerate((0, 0, 1))
    )
    assert_equal_states(first, second)
    assert_states_differ(first, other)


def test_batches_hold_images_of_each_cluster(make_engine, tmp_path):
    engine = make_engine(method="ClusterContrast")
    seen = []
    step = engine.forward_backward

    def recorded(batch):
        seen.append(network_of(engine).method.labels[batch["pid"]])
        return step(batch)

    engine.forward_backward = recorded
    run(engine, tmp_path)
    assert len(seen) == 2 * (IMAGES // BATCH)
    for labels in seen:
        blocks = labels.reshape(2, 4)
        assert (blocks == blocks[:, :1]).all()
        assert blocks[0, 0] != blocks[1, 0]
        assert (labels >= 0).all()


def test_epochs_follow_the_stream_of_the_seed(make_engine, tmp_path):
    engine = make_engine(seed=3, iters_per_epoch=2)
    seen = []
    step = engine.forward_backward

    def recorded(batch):
        seen.extend(batch["pid"].tolist())
        return step(batch)

    engine.forward_backward = recorded
    run(engine, tmp_path, 4)
    stream = StreamSampler(IMAGES, batch_size=BATCH, seed=3)
    assert seen == [key.index for key in itertools.islice(stream, 4 * 2 * BATCH)]


def test_clusters_are_renewed_every_few_epochs(make_engine, tmp_path):
    engine = make_engine(
        method="ClusterContrast", clustering={**CLUSTERING, "period": 2}, iters_per_epoch=1
    )
    engine.writer = writer = Scalars()
    run(engine, tmp_path, 4)
    assert list(writer.found["Clusters/num_clusters"]) == [0, 2]


def test_iterations_per_epoch_are_an_option(make_engine, tmp_path):
    engine = run(make_engine(iters_per_epoch=7), tmp_path, 1)
    assert network_of(engine).method.step == len(engine.train_loader) == 7


def test_clustering_is_a_labeler_or_its_options(make_engine, tmp_path):
    by_options = make_engine(method="ClusterContrast")
    labeler = DBSCANLabeler(**CLUSTERING)
    by_labeler = make_engine(method="ClusterContrast", clustering=labeler)
    run(by_options, tmp_path / "options", 1)
    run(by_labeler, tmp_path / "labeler", 1)
    assert_equal_states(by_options, by_labeler)
    assert by_options.num_clusters == network_of(by_options).method.labels.max() + 1


def test_micro_batches_equal_the_ghost_batches_of_a_whole_one(make_engine, tmp_path):
    """A batch of 8 whose norms see groups of 4 is the same in two parts of 4."""
    engines, losses = [], []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = build_selcon_model(
            "osnet_x0_25", pretrained=False, input_size=(64, 32), ghost_batch_size=4
        )
        engines.append(
            make_engine(
                model=model,
                method="ClusterContrast",
                micro_batches=parts,
                iters_per_epoch=1,
            )
        )
        losses.append(record_losses(engines[-1]))
        run(engines[-1], tmp_path / str(parts), 1)
    ((whole,), (in_parts,)) = losses
    assert in_parts == pytest.approx(whole, rel=1e-4)
    whole, in_parts = (dict(network_of(engine).named_parameters()) for engine in engines)
    for name, weight in whole.items():
        torch.testing.assert_close(in_parts[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_loss_of_a_step_is_the_mean_over_micro_batches(make_engine):
    engine = make_engine(method="ClusterContrast", micro_batches=2, scheduler="cosine")
    engine.max_epoch = 1
    engine._get_ready()
    engine._training.refresh_pseudo_labels(0, 0)
    batch = next(iter(engine.train_loader))
    network = network_of(engine).train()
    twin = copy.deepcopy(network)
    by_hand = [
        twin.losses(part["img"], part["pid"], part["camid"])["loss_cluster"].item()
        for part in split_batch(batch, 2)
    ]
    summary = engine.forward_backward(batch)
    assert summary["loss_cluster"] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert summary["loss"] == pytest.approx(summary["loss_cluster"])
    assert network.method.step == 1


# --- going on from a checkpoint ----------------------------------------------------------

CASES = {
    "stream": {},
    "clusters": {"method": "SelConCluster", "outlier_ratio": 0.5},
    # Period 2: a checkpoint after the first epoch is in the middle of one.
    "period": {"method": "ClusterContrast", "clustering": {**CLUSTERING, "period": 2}},
    "teacher": {"method": "ClusterContrast", "ema_decay": 0.9},
    "filters": {
        "method": "ClusterContrast",
        "clustering": {**CLUSTERING, "reliability": True},
    },
}


def by_file(make, file, folder):
    engine = make()
    return engine, engine.resume(file)


def by_folder(make, file, folder):
    (folder / "model").mkdir(parents=True)
    shutil.copy(file, folder / "model")
    engine = make()
    return engine, engine.resume(folder)


def by_torchreid_before(make, file, folder):
    engine = make(resumed=file)
    return engine, 1


def by_torchreid_after(make, file, folder):
    engine = make()
    epoch = torchreid.utils.resume_from_checkpoint(
        str(file), engine.model, engine.optimizer, engine.scheduler
    )
    return engine, epoch


@pytest.fixture
def resumable(manager):
    """Make engines; with ``resumed``, of a model that torchreid has loaded before."""

    def make(case, *, workers=0, resumed=None):
        torch.manual_seed(0)
        model = build_selcon_model(
            "osnet_x0_25", pretrained=False, input_size=(64, 32), num_parts=2
        )
        optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=0.02)
        scheduler = torchreid.optim.build_lr_scheduler(
            optimizer, lr_scheduler="cosine", max_epoch=3
        )
        if resumed is not None:
            torchreid.utils.resume_from_checkpoint(
                str(resumed), model, optimizer, scheduler
            )
        options = {"num_neighbors": 3, "num_negatives": 20, "clustering": CLUSTERING}
        options |= {"iters_per_epoch": 2, **CASES[case]}
        if options.get("method") == "ClusterContrast":
            del options["num_neighbors"], options["num_negatives"]
        if case == "stream":
            options["warmup_epochs"] = 1
        return ImageSelConEngine(
            manager(workers=workers), model, optimizer, scheduler, use_gpu=False, **options
        )

    return make


@pytest.mark.parametrize(
    ("case", "way", "workers"),
    [
        ("stream", by_file, 0),
        ("stream", by_torchreid_before, 2),
        ("clusters", by_folder, 0),
        ("clusters", by_torchreid_after, 2),
        ("period", by_file, 0),
        ("period", by_torchreid_before, 0),
        ("teacher", by_folder, 0),
        ("teacher", by_torchreid_before, 0),
        ("teacher", by_torchreid_after, 0),
        ("filters", by_file, 0),
    ],
)
def test_resumed_run_equals_the_unbroken_one(resumable, tmp_path, case, way, workers):
    unbroken = run(resumable(case), tmp_path / "unbroken", 3)

    def make(**options):
        return resumable(case, workers=workers, **options)

    file = tmp_path / "unbroken" / "model" / "model.pth.tar-1"
    engine, start_epoch = way(make, file, tmp_path / "resumed")
    assert start_epoch == 1
    run(engine, tmp_path / "resumed", 3, start_epoch=start_epoch)
    assert_equal_states(unbroken, engine)
    assert engine.results == unbroken.results
    for mine, other in zip(
        engine.optimizer.state_dict()["param_groups"],
        unbroken.optimizer.state_dict()["param_groups"],
        strict=True,
    ):
        assert mine == other


def test_engine_goes_on_where_it_was_resumed(make_engine, tmp_path):
    unbroken = run(make_engine(), tmp_path, 2)
    engine = make_engine()
    engine.resume(tmp_path / "model" / "model.pth.tar-1")
    assert engine.start_epoch == 1
    run(engine, tmp_path / "resumed")  # without start_epoch
    assert_equal_states(unbroken, engine)
    assert checkpoints_in(tmp_path / "resumed") == ["model.pth.tar-2"]


def test_seconds_and_clusters_of_the_first_part_are_remembered(make_engine, tmp_path):
    first = run(make_engine(method="ClusterContrast", clustering={**CLUSTERING}), tmp_path)
    second = make_engine(method="ClusterContrast")
    second.resume(tmp_path)
    assert second.num_clusters == first.num_clusters > 1
    assert 0 < second.meter.seconds <= first.meter.seconds


def test_what_filters_remember_survives_a_checkpoint(make_engine, tmp_path):
    options = {
        "method": "ClusterContrast",
        "clustering": {**CLUSTERING, "reliability": True},
        "iters_per_epoch": 1,
    }
    remembered = run(make_engine(**options), tmp_path)._training.labeler.state_dict()
    assert any(remembered.values())
    again = make_engine(**options)
    assert again._training.labeler.state_dict() != remembered
    again.resume(tmp_path)
    assert again._training.labeler.state_dict() == remembered


def test_complete_run_is_evaluated_and_nothing_is_written(make_engine, tmp_path):
    trained = run(make_engine(ema_decay=0.9, iters_per_epoch=2), tmp_path)
    files = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    again = make_engine(ema_decay=0.9, iters_per_epoch=2)
    again.resume(tmp_path)
    run(again, tmp_path)
    assert again.results == trained.results
    assert {file: file.read_bytes() for file in (tmp_path / "model").iterdir()} == files


def test_run_of_other_settings_or_images_is_refused(
    make_engine, manager, folder_source, tmp_path
):
    run(make_engine(iters_per_epoch=1), tmp_path, 1)
    with pytest.raises(ValueError, match=r"cannot resume: seed was 0 and is 7.*settings"):
        make_engine(seed=7).resume(tmp_path)
    more = manager(combineall=True)
    with pytest.raises(ValueError, match=r"num_images was 40 and is \d+; image_list was"):
        make_engine(datamanager=more).resume(tmp_path)
    with pytest.raises(ValueError, match="method was 'SelectiveContrastive' and is"):
        make_engine(method="ClusterContrast").resume(tmp_path)
    with pytest.raises(ValueError, match="batch_size was 8 and is 4"):
        make_engine(datamanager=manager(batch_size_train=4)).resume(tmp_path)
    # The same number of images, of unknown cameras.
    other = manager(sources=folder_source, targets="few")
    with pytest.raises(ValueError, match="cannot resume: image_list was"):
        make_engine(datamanager=other).resume(tmp_path)


def test_checkpoint_of_another_model_is_refused(make_engine, tmp_path):
    run(make_engine(iters_per_epoch=1), tmp_path, 1)
    model = build_selcon_model("osnet_x0_5", pretrained=False, input_size=(64, 32))
    with pytest.raises(ValueError, match=r"tar-1 is of another model: size mismatch"):
        make_engine(model=model).resume(tmp_path)


def test_foreign_and_missing_checkpoints_are_refused(make_engine, tmp_path):
    engine = make_engine()
    file = tmp_path / "softmax.pth.tar"
    torch.save({"state_dict": {}, "epoch": 3, "optimizer": {}}, file)
    with pytest.raises(ValueError, match=r"softmax\.pth\.tar is not a checkpoint of a run"):
        engine.resume(file)
    for missing in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            engine.resume(missing)


def test_resume_takes_what_was_written_last(make_engine, tmp_path):
    """A folder may hold the longer run that was there before."""
    run(make_engine(iters_per_epoch=1), tmp_path, 3)
    run(make_engine(iters_per_epoch=1, keep_checkpoints=1), tmp_path, 1)
    assert checkpoints_in(tmp_path) == [f"model.pth.tar-{epoch}" for epoch in (1, 2, 3)]
    assert make_engine().resume(tmp_path) == 1


# --- checkpoints -------------------------------------------------------------------------


def test_checkpoint_is_read_without_running_code_and_holds_everything(
    make_engine, tmp_path
):
    options = {"method": "SelConCluster", "ema_decay": 0.5, "iters_per_epoch": 2}
    engine = run(make_engine(**options), tmp_path, 1)
    file = tmp_path / "model" / "model.pth.tar-1"
    checkpoint = torch.load(file, weights_only=True)
    assert {"state_dict", "epoch", "rank1", "optimizer", "scheduler"} <= checkpoint.keys()
    assert checkpoint["epoch"] == 1
    assert 100 * checkpoint["rank1"] == pytest.approx(engine.results["few"]["Rank-1"])
    state = checkpoint["state_dict"]
    method = network_of(engine).method
    assert torch.equal(state["method.labels"], method.labels)
    assert method.labels.max() > 0
    banks = [name for name in state if name.startswith("method.") and "bank" in name]
    assert any(state[name].any() for name in banks)
    assert any(name.startswith("teacher.module.backbone.") for name in state)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"checkpoint_period": 2}, [2, 4, 5]),
        ({"checkpoint_period": 0}, [5]),
        ({"keep_checkpoints": 2}, [4, 5]),
        ({"keep_checkpoints": 2, "checkpoint_period": 2}, [4, 5]),
    ],
)
def test_which_checkpoints_there_are(make_engine, tmp_path, options, epochs):
    run(make_engine(iters_per_epoch=1, **options), tmp_path, 5)
    assert checkpoints_in(tmp_path) == [f"model.pth.tar-{epoch}" for epoch in epochs]


def test_best_weights_without_labels_are_kept(make_engine, tmp_path, monkeypatch):
    # Untrained, a network this small puts most images into one cluster.
    monkeypatch.setattr("selcon_plugin.metrics.collapse.MAX_CLUSTER_RATIO", 1.0)
    options = {"method": "SelConCluster", "keep_best_by": "outlier_ratio"}
    engine = run(make_engine(iters_per_epoch=2, **options), tmp_path, 2)
    kept = torch.load(tmp_path / "model" / "best_without_labels.pth", weights_only=True)
    assert kept["epoch"] in (1, 2)
    assert not any(key.startswith("method.") for key in kept["state_dict"])
    if kept["epoch"] == 2:  # judged after training: the weights that came out
        for key, value in network_of(engine).state_dict().items():
            if not key.startswith("method."):
                assert torch.equal(value, kept["state_dict"][key])
    resumed = make_engine(iters_per_epoch=2, **options)
    resumed.resume(tmp_path)
    assert resumed._best.value == engine._best.value >= 0


def test_half_written_file_never_takes_the_place_of_a_whole_one(
    make_engine, tmp_path, monkeypatch
):
    engine = run(make_engine(iters_per_epoch=1), tmp_path, 1)
    file = tmp_path / "model" / "model.pth.tar-1"
    whole = file.read_bytes()

    def die(data, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        for epoch in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                engine.save_model(epoch, 0.0, str(tmp_path))
    assert file.read_bytes() == whole
    assert make_engine().resume(tmp_path) == 1  # what was begun is no checkpoint


def test_best_checkpoint_has_torchreids_name(make_engine, tmp_path):
    engine = run(make_engine(iters_per_epoch=1), tmp_path, 1)
    engine.save_model(0, 0.5, str(tmp_path), is_best=True)
    best = torch.load(tmp_path / "model" / "model-best.pth.tar", weights_only=True)
    assert (best["epoch"], best["rank1"]) == (1, 0.5)


# --- a plain model of torchreid ----------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_plain_model_gets_a_head_that_learns(adopt, tmp_path, parallel):
    engine = adopt(parallel=parallel)
    network = network_of(engine)
    assert isinstance(network, SelConModel)
    assert isinstance(engine.model, nn.DataParallel) == parallel
    assert not any("classifier" in name for name, _ in network.named_parameters())
    groups = engine.optimizer.param_groups
    taught = {id(p) for p in groups[-1]["params"]}
    head = dict(network.heads.named_parameters())
    assert {id(p) for p in head.values()} <= taught
    assert not taught & {id(p) for p in network.backbone.parameters()}
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    run(engine, tmp_path, 1)
    unchanged = [n for n, p in network.named_parameters() if torch.equal(before[n], p)]
    # A gate of OSNet x0.25 squeezes to one channel, which may be dead at the start.
    assert [name for name in unchanged if "gate.fc1" not in name] == []


def test_adopted_model_resumes(adopt, tmp_path):
    unbroken = run(adopt(iters_per_epoch=2), tmp_path, 2)
    engine = adopt(iters_per_epoch=2)
    engine.resume(tmp_path / "model" / "model.pth.tar-1")
    run(engine, tmp_path / "resumed", 2)
    assert_equal_states(unbroken, engine)


@pytest.mark.parametrize("scheduler", ["single_step", "multi_step", "cosine"])
def test_schedule_lowers_the_rate_of_the_head_too(adopt, tmp_path, scheduler):
    weight = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([weight], lr=0.02)
    schedule = torchreid.optim.build_lr_scheduler(
        reference,
        lr_scheduler=scheduler,
        stepsize=[1, 2] if scheduler == "multi_step" else 1,
        max_epoch=2,
    )
    engine = adopt(scheduler=scheduler, iters_per_epoch=1)
    for epoch in range(3):  # cosine begins to rise again
        engine.start_epoch = epoch
        run(engine, tmp_path, epoch + 1)
        reference.step()
        schedule.step()
        expected = reference.param_groups[0]["lr"]
        assert expected < 0.02
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        assert rates == pytest.approx([expected] * 2)


def test_head_learns_at_the_rate_of_new_layers(manager):
    model, optimizer, schedule = plain_model(
        staged_lr=True, new_layers="classifier", base_lr_mult=0.1
    )
    ImageSelConEngine(manager(), model, optimizer, schedule, use_gpu=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.002, 0.02, 0.02])


def test_schedule_that_cannot_take_the_head_in_is_refused(manager):
    model, optimizer, _ = plain_model(scheduler=None)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)
    with pytest.raises(ValueError, match=r"LambdaLR cannot take in .*build_selcon_model"):
        ImageSelConEngine(manager(), model, optimizer, warm_up, use_gpu=False)
    assert len(optimizer.param_groups) == 1


def test_without_a_schedule(adopt, tmp_path):
    run(adopt(scheduler=None, iters_per_epoch=1), tmp_path, 1)
    assert adopt(scheduler=None).resume(tmp_path) == 1


@pytest.mark.parametrize("parallel", [False, True])
def test_two_stepped_learning_moves_the_head_alone(adopt, tmp_path, parallel):
    engine = adopt(parallel=parallel)
    network = network_of(engine)
    engine._get_ready()  # calibrates the head
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(engine, tmp_path, 1, fixbase_epoch=1, open_layers="heads")
    for name, value in network.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, before[name]), name
    moved = [n for n, p in network.heads.named_parameters(prefix="heads")]
    assert all(not torch.equal(before[name], state_of(engine)[name]) for name in moved)
    engine.start_epoch = 1
    run(engine, tmp_path, 2, fixbase_epoch=1, open_layers="heads")
    weight = "backbone.model.conv1.conv.weight"
    assert not torch.equal(state_of(engine)[weight], before[weight])


def test_head_of_a_model_that_has_one_is_refused(make_engine):
    with pytest.raises(ValueError, match=r"head .*'num_parts': 4.*build_selcon_model"):
        make_engine(head={"num_parts": 4})


def test_images_that_are_not_normalised_are_known_as_such(manager, adopt):
    engine = adopt(
        datamanager=manager(norm_mean=[0.5, 0.4, 0.3], norm_std=[0.2, 0.1, 0.25])
    )
    network = network_of(engine)
    assert network.pixel_mean.flatten().tolist() == pytest.approx([127.5, 102, 76.5])
    assert network.pixel_std.flatten().tolist() == pytest.approx([51, 25.5, 63.75])


# --- parts -------------------------------------------------------------------------------


def test_method_without_parts_drops_them(make_engine, tmp_path):
    engine = make_engine(method="ClusterContrast", iters_per_epoch=1)
    network = network_of(engine)
    assert network.heads.num_parts == 0
    assert not any("part" in name for name, _ in network.named_parameters())
    run(engine, tmp_path, 1)
    images = torch.zeros(2, 3, 64, 32)
    assert network.eval()(images).shape == (2, network.heads.global_dim)


def test_model_without_parts_trains(make_engine, tmp_path):
    model = build_selcon_model(
        "osnet_x0_25", pretrained=False, input_size=(64, 32), num_parts=0
    )
    engine = make_engine(model=model)
    losses = record_losses(engine)
    run(engine, tmp_path, 1)
    assert set(losses[0]) == {"loss_global", "loss"}
    assert engine.results["few"]["mAP"] > 0


# --- evaluation --------------------------------------------------------------------------


def features_by_hand(engine, split, name="few"):
    features, pids, camids = [], [], []
    with torch.no_grad():
        for batch in engine.datamanager.test_loader[name][split]:
            features.append(engine.model.eval()(batch["img"]))
            pids.extend(batch["pid"].tolist())
            camids.extend(batch["camid"].tolist())
    return torch.cat(features), np.asarray(pids), np.asarray(camids)


def results_by_hand(engine, *, rerank=False):
    (query, *of_query), (gallery, *of_gallery) = (
        features_by_hand(engine, split) for split in ("query", "gallery")
    )
    query, gallery = query.double(), gallery.double()
    distance = torch.cdist(query, gallery).square()
    if rerank:
        distance = torchreid.utils.re_ranking(
            distance.numpy(),
            torch.cdist(query, query).square().numpy(),
            torch.cdist(gallery, gallery).square().numpy(),
        )
    cmc, mean_ap = torchreid.metrics.evaluate_rank(
        np.asarray(distance),
        of_query[0],
        of_gallery[0],
        of_query[1],
        of_gallery[1],
        use_cython=False,
    )
    return {"mAP": 100 * mean_ap, "Rank-1": 100 * cmc[0]}


def test_results_are_torchreids_metrics_of_the_models_features(make_engine, tmp_path):
    engine = run(make_engine(), tmp_path, 1)
    assert engine.results["few"] == pytest.approx(results_by_hand(engine))


def test_gallery_that_leaves_queries_different_numbers_of_images(make_engine, tmp_path):
    """torchreid's own loop fails on it if the gallery is small."""
    spec = SyntheticPersonsSpec(
        num_train_ids=2, num_test_ids=3, images_per_id=8, num_cameras=3, num_distractors=2
    )
    register_synthetic_persons("uneven", spec)
    data = torchreid.data.ImageDataManager(
        root=str(tmp_path),
        sources="uneven",
        height=64,
        width=32,
        batch_size_train=BATCH,
        workers=0,
        use_gpu=False,
    )
    engine = make_engine(datamanager=data)
    kept = torchreid.metrics.evaluate_rank
    engine.test(ranks=[1, 5, 10, 20])
    assert torchreid.metrics.evaluate_rank is kept
    (query, q_pids, q_cams), (gallery, g_pids, g_cams) = (
        features_by_hand(engine, split, "uneven") for split in ("query", "gallery")
    )
    precisions, first, lengths = [], [], set()
    for feature, pid, camid in zip(query, q_pids, q_cams, strict=True):
        distance = (gallery - feature).square().sum(dim=1)
        others = [
            bool(g_pids[i] == pid)
            for i in distance.argsort().tolist()
            if not (g_pids[i] == pid and g_cams[i] == camid)
        ]
        lengths.add(len(others))
        places = [place for place, match in enumerate(others) if match]
        precisions.append(np.mean([(n + 1) / (p + 1) for n, p in enumerate(places)]))
        first.append(others[0])
    assert len(lengths) > 1
    expected = {"mAP": 100 * np.mean(precisions), "Rank-1": 100 * np.mean(first)}
    assert engine.results["uneven"] == pytest.approx(expected)


def test_evaluation_alone_by_any_distance(make_engine, tmp_path):
    engine = make_engine()
    before = {name: value.clone() for name, value in state_of(engine).items()}
    plain = run(engine, tmp_path, test_only=True).results["few"]
    assert plain == pytest.approx(results_by_hand(engine))
    for options in ({"dist_metric": "cosine"}, {"normalize_feature": True}):
        engine.results = {}
        run(engine, tmp_path, test_only=True, **options)
        assert engine.results["few"] == pytest.approx(plain)
    run(engine, tmp_path, test_only=True, rerank=True)
    assert engine.results["few"] == pytest.approx(results_by_hand(engine, rerank=True))
    after = state_of(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not list(tmp_path.iterdir())


def test_visrank_draws_every_query(make_engine, tmp_path):
    engine = make_engine()
    run(engine, tmp_path, test_only=True, visrank=True, visrank_topk=3)
    queries, _ = engine.datamanager.fetch_test_loaders("few")
    pictures = list((tmp_path / "visrank_few").glob("*.jpg"))
    assert {file.stem for file in pictures} == {Path(item[0]).stem for item in queries}
    with Image.open(pictures[0]) as picture:
        assert picture.height == 64


def test_evaluation_along_the_way_and_at_the_end(make_engine, tmp_path):
    engine = make_engine(iters_per_epoch=1, checkpoint_period=0)
    evaluated = []
    test = engine.test
    engine.test = lambda **options: evaluated.append(engine.epoch) or test(**options)
    run(engine, tmp_path, 5, eval_freq=2, start_eval=4)
    assert evaluated == [3, 4]
    assert checkpoints_in(tmp_path) == ["model.pth.tar-4", "model.pth.tar-5"]


def test_teacher_is_evaluated(make_engine, tmp_path):
    engine = run(make_engine(ema_decay=0.9), tmp_path)
    network = network_of(engine)
    assert engine.results["few"] == pytest.approx(results_by_hand(engine))
    taught, *_ = features_by_hand(engine, "query")
    teacher, network.teacher = network.teacher, None
    own, *_ = features_by_hand(engine, "query")
    assert not torch.allclose(taught, own, atol=1e-3)
    assert all(p.grad is None for p in teacher.parameters())
    held = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("by_torchreid", [False, True])
def test_teacher_of_a_checkpoint_is_evaluated(make_engine, tmp_path, by_torchreid):
    trained = run(make_engine(ema_decay=0.9, iters_per_epoch=2), tmp_path)
    engine = make_engine(ema_decay=0.9)
    file = tmp_path / "model" / "model.pth.tar-2"
    if by_torchreid:
        torchreid.utils.resume_from_checkpoint(str(file), engine.model)
    else:
        engine.resume(file)
    run(engine, tmp_path, test_only=True)
    assert engine.results == trained.results
    assert network_of(engine).teacher.step == 4


def test_weight_of_the_global_feature_holds_without_training(make_engine):
    engine = make_engine(global_distance_weight=0.2)
    network = network_of(engine).eval()
    with torch.no_grad():
        feature = network(torch.rand(2, 3, 64, 32))
    squares = feature[:, : network.heads.global_dim].square().sum(dim=1)
    assert torch.allclose(squares, torch.full((2,), 0.2), atol=1e-5)


# --- data --------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, []])
def test_image_folder_without_test_set_trains(
    make_engine, manager, folder_source, tmp_path, targets
):
    data = manager(sources=folder_source, targets=targets)
    engine = run(make_engine(datamanager=data, method="ClusterContrast"), tmp_path, 1)
    assert engine.results == {}
    assert checkpoints_in(tmp_path) == ["model.pth.tar-1"]
    images = engine.train_loader.dataset
    assert (len(images), images.num_cameras, images.evaluation_only_identities) == (
        IMAGES,
        0,
        None,
    )


def test_combined_sources(make_engine, manager, folder_source, tmp_path):
    data = manager(sources=["few", folder_source], targets="few")
    engine = run(make_engine(datamanager=data, iters_per_epoch=1), tmp_path, 1)
    images = engine.train_loader.dataset
    assert (len(images), images.num_cameras) == (2 * IMAGES, 3)
    assert images.camids.count(-1) == images.evaluation_only_pids.count(-1) == IMAGES
    assert network_of(engine).method.num_images == 2 * IMAGES
    assert engine.results.keys() == {"few"}


def test_query_and_gallery_may_join_the_training(make_engine, manager, tmp_path):
    data = manager(combineall=True)
    engine = run(make_engine(datamanager=data, iters_per_epoch=1), tmp_path, 1)
    query, gallery = data.fetch_test_loaders("few")
    assert len(engine.train_loader.dataset) == IMAGES + len(query) + len(gallery)


def test_manager_of_videos_is_refused(make_engine, manager):
    videos = manager()
    videos.data_type = "video"
    with pytest.raises(ValueError, match="an ImageDataManager, not a manager of video"):
        make_engine(datamanager=videos)


def test_several_augmented_copies_are_one_with_a_warning(make_engine, manager, caplog):
    make_engine(datamanager=manager(k_tfm=2))
    assert "k_tfm 2: one augmented copy" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 0.1}, r"no option tau with the method Selective.*temperature"),
        ({"temperature": 0.0}, r"temperature must be a number > 0, got 0\.0"),
        ({"method": "Magic"}, r"unknown method 'Magic'; known .*SelectiveContrastive"),
        ({"num_parts": 4}, "no option num_parts"),
        ({"ema_decay": 1.0}, r"ema_decay must be .* < 1, got 1\.0"),
        ({"micro_batches": 3}, r"\(8, .*multiple of\s+micro-batches \(3\)"),
        ({"sampler": "pk"}, r"sampler pk draws from clusters.*leave it at 'auto'"),
        ({"sampler": "random"}, r"sampler must be .*'pk_camera'"),
        ({"clustering": {"epsilon": 0.5}}, r"no option epsilon with the labeler DBSCAN"),
        ({"clustering": {"eps": 1.5}}, r"eps must be .*<= 1 or 'auto', got 1\.5"),
        ({"clustering": {"labeler": "Magic"}}, r"labeler must be .*'DBSCAN'.*'Magic'"),
        ({"clustering": {"period": 0}}, r"period must be a whole number >= 1, got 0"),
        ({"method": "ClusterContrast", "num_instances": 3}, r"images per cluster \(3\)"),
        ({"camera_weight": "batch"}, "camera_weight 'batch' needs clusters"),
    ],
)
def test_wrong_settings_end_before_training(make_engine, options, words):
    with pytest.raises(ValueError, match=words):
        make_engine(**options)


def test_fewer_images_than_a_batch_is_an_error_that_says_so(make_engine, manager):
    with pytest.raises(ValueError, match=r"40 training images do not fill.*\(64\)"):
        make_engine(datamanager=manager(batch_size_train=64))


# --- what a user watches -----------------------------------------------------------------


def test_diagnostics_are_printed_and_written(make_engine, tmp_path, capsys):
    engine = make_engine(diagnostics_period=2, warmup_epochs=0)
    engine.writer = writer = Scalars()
    run(engine, tmp_path, 1, print_freq=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch: [" in line]
    assert ["neighbor_precision" in line for line in lines] == [False, *4 * [True]]
    assert all("loss_part" in line and "lr 0.02" in line for line in lines)
    precision = writer.found["Train/neighbor_precision"]
    assert all(0 <= value <= 1 for value in precision.values())
    assert {"Train/loss", "Train/lr", "Test/few/mAP"} <= writer.found.keys()


def test_clusters_are_printed_and_written(make_engine, tmp_path, capsys, monkeypatch):
    # In a script nobody has set up logging; under pytest the root logger has handlers.
    package = logging.getLogger("selcon_plugin")
    monkeypatch.setattr(package, "propagate", False)
    engine = make_engine(method="ClusterContrast", iters_per_epoch=1)
    engine.writer = writer = Scalars()
    run(engine, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "purity" in line]
    assert [line.split(":")[0] for line in lines] == ["Epoch 1", "Epoch 2"]
    assert all("num_clusters" in line and "silhouette" in line for line in lines)
    assert not package.handlers
    for name in ("purity", "num_clusters", "clustering_seconds"):
        assert list(writer.found[f"Clusters/{name}"]) == [0, 1]
    assert writer.found["Clusters/num_clusters"][1] == engine.num_clusters


def test_tensorboard_file_is_written(make_engine, tmp_path):
    run(make_engine(iters_per_epoch=1), tmp_path, 1)
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_images_without_identities_report_no_purity(
    make_engine, manager, folder_source, tmp_path
):
    data = manager(sources=folder_source, targets=[])
    engine = make_engine(
        datamanager=data, method="SelConCluster", diagnostics_period=1, num_negatives=20
    )
    engine.writer = writer = Scalars()
    run(engine, tmp_path, 1)
    names = {name.partition("/")[2] for name in writer.found}
    assert "num_clusters" in names
    assert not names & {"purity", "neighbor_precision"}


# --- a method of the user's own ----------------------------------------------------------


@pytest.fixture
def views_method(monkeypatch):
    """A method of a user's script that compares a batch with two views of it."""
    monkeypatch.setattr(base, "_METHODS", copy.copy(base._METHODS))
    seen = SimpleNamespace(images=[], index=[], features=[])

    @register_method("Views")
    class Views(ClusterContrast):
        def __init__(
            self,
            num_images: int,
            global_dim: int,
            num_parts: int = 0,
            part_dim: int = 0,
            *,
            view_weight: Annotated[float, Interval(0)] = 1.0,
        ) -> None:
            super().__init__(num_images, global_dim)
            self.view_weight = view_weight

        def make_views(self, images):
            seen.images.append(images.clone())
            return images, images.flip(2)

        def loss(self, embeddings, index, camids, *views):
            seen.index.append(index)
            seen.features.append([e.global_features for e in (embeddings, *views)])
            losses = super().loss(embeddings, index, camids)
            apart = embeddings.global_features - views[1].global_features
            return {**losses, "loss_view": self.view_weight * apart.square().sum(1).mean()}

    return seen


def test_method_of_a_users_script_gets_its_views(
    make_engine, manager, tmp_path, views_method
):
    engine = make_engine(
        datamanager=manager(transforms=[]), method="Views", view_weight=0.5
    )
    losses = record_losses(engine)
    run(engine, tmp_path, 1)
    assert len(views_method.images) == IMAGES // BATCH
    # What the method sees are the pixels of the files, 0..255.
    images = engine.train_loader.dataset
    *to_pixels, _ = engine.datamanager.transform_tr.transforms
    for index, batch in zip(views_method.index, views_method.images, strict=True):
        for number, seen in zip(index.tolist(), batch, strict=True):
            picture = images.read(images.paths[number])
            for transform in to_pixels:
                picture = transform(picture)
            assert torch.allclose(seen, 255 * picture, atol=1e-3)
    # The first view is the batch itself, the second another one.
    for own, same, flipped in views_method.features:
        assert torch.allclose(own, same, atol=1e-3)
        assert not torch.allclose(own, flipped, atol=1e-3)
        assert flipped.requires_grad
    assert losses[0]["loss"] == pytest.approx(
        losses[0]["loss_cluster"] + losses[0]["loss_view"]
    )


def test_option_of_a_users_method_is_checked(make_engine, views_method):
    with pytest.raises(ValueError, match=r"view_weight must be a number >= 0, got -1"):
        make_engine(method="Views", view_weight=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_training_on_a_gpu_fills_banks_there(manager, tmp_path, method):
    torch.manual_seed(0)
    model = build_selcon_model(
        "osnet_x0_25", pretrained=False, input_size=(64, 32), num_parts=2
    ).cuda()
    optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=0.02)
    engine = ImageSelConEngine(
        manager(use_gpu=True, workers=2),
        model,
        optimizer,
        method=method,
        clustering=CLUSTERING,
        ema_decay=0.9,
    )
    run(engine, tmp_path)
    assert all(buffer.is_cuda for buffer in network_of(engine).method.buffers())
    assert engine.results["few"]["mAP"] > 0
    assert engine.resume(tmp_path) == 2


def test_pictures_and_a_line_for_each_stage(make_engine, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="selcon_plugin")
    engine = make_engine(method="ClusterContrast", tensorboard_pictures=True)
    engine.run(save_dir=str(tmp_path), max_epoch=1, print_freq=100)
    (vectors,) = tmp_path.rglob("tensors.tsv")
    assert len(vectors.read_text().splitlines()) == 40
    for stage in (
        "Features of 40 images: ",
        "Clustering 40 images: ",
        "Training, epoch 1 of 1: 5 steps in ",
        "Evaluation on few, query: ",
        "Evaluation on few, gallery: ",
    ):
        assert stage in caplog.text

"""``ImageSelConEngine`` trains: whole runs on torchreid's data manager, tiny and real."""

import copy
import itertools

import numpy as np
import pytest
import torch

from helpers.engines import (
    BATCH,
    CLUSTERING,
    IMAGES,
    METHODS,
    NETWORK,
    Scalars,
    assert_equal_states,
    assert_states_differ,
    network_of,
    record_losses,
    run,
    state_of,
)
from selcon_plugin.clustering import DBSCANLabeler
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.engine.batches import split_batch
from selcon_plugin.samplers.stream import StreamSampler
from selcon_plugin.torchreid_ext import (
    ImageSelConEngine,
    build_selcon_model,
)

torchreid = import_torchreid()


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


def test_clusters_are_refreshed_every_few_epochs(make_engine, tmp_path):
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
            NETWORK, pretrained=False, input_size=(64, 32), ghost_batch_size=4
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
    engine._prepare_network()
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


def test_method_without_parts_drops_them(make_engine, tmp_path):
    engine = make_engine(method="ClusterContrast", iters_per_epoch=1)
    network = network_of(engine)
    assert network.heads.num_parts == 0
    assert not any("part" in name for name, _ in network.named_parameters())
    run(engine, tmp_path, 1)
    images = torch.zeros(2, 3, 64, 32)
    assert network.eval()(images).shape == (2, network.heads.global_dim)


def test_model_without_parts_trains(make_engine, tmp_path):
    model = build_selcon_model(NETWORK, pretrained=False, input_size=(64, 32), num_parts=0)
    engine = make_engine(model=model)
    losses = record_losses(engine)
    run(engine, tmp_path, 1)
    assert set(losses[0]) == {"loss_global", "loss"}
    assert engine.results["few"]["mAP"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_training_on_a_gpu_fills_banks_there(manager, tmp_path, method):
    torch.manual_seed(0)
    model = build_selcon_model(
        NETWORK, pretrained=False, input_size=(64, 32), num_parts=2
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

"""The data and options that ``ImageSelConEngine`` accepts, and what it logs."""

import logging

import pytest
import torch

from helpers.engines import IMAGES, Scalars, checkpoints_in, network_of, run
from selcon_plugin.samplers.stream import SampleKey


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


def test_random_patches_do_not_depend_on_the_images_before(make_engine, manager):
    data = manager(transforms=["random_flip", "random_patch"])
    images = make_engine(datamanager=data).train_loader.dataset

    def patched(positions):
        samples = [images[SampleKey(number % IMAGES, number)] for number in positions]
        return torch.stack([sample["img"] for sample in samples])

    unbroken = patched(range(120))  # torchreid's own pool pastes from 100 images on
    assert torch.equal(patched(range(110, 120)), unbroken[110:])
    images.transform.transforms.pop(2)
    plain = patched(range(120))
    changed = (plain != unbroken).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7  # the probability is one half


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
        ({"temperature": 0.0}, r"temperature .*> 0.*got 0\.0"),
        ({"method": "Magic"}, r"unknown method 'Magic'; known .*SelectiveContrastive"),
        ({"num_parts": 4}, "no option num_parts"),
        ({"ema_decay": 1.0}, r"ema_decay .* < 1, got 1\.0"),
        ({"micro_batches": 3}, r"\(8, .*multiple of\s+micro-batches \(3\)"),
        ({"sampler": "pk"}, r"sampler pk samples from clusters.*set it to 'auto'"),
        ({"sampler": "random"}, r"sampler .*'pk_camera'"),
        ({"clustering": {"epsilon": 0.5}}, r"no option epsilon with the labeler DBSCAN"),
        ({"clustering": {"eps": 1.5}}, r"eps .*<= 1 or 'auto', got 1\.5"),
        ({"clustering": {"labeler": "Magic"}}, r"labeler .*'DBSCAN'.*'Magic'"),
        ({"clustering": {"period": 0}}, r"period .*>= 1.*got 0"),
        ({"method": "ClusterContrast", "num_instances": 3}, r"images per cluster \(3\)"),
        ({"camera_weight": "batch"}, "camera_weight 'batch' needs clusters"),
    ],
)
def test_wrong_settings_end_before_training(make_engine, options, words):
    with pytest.raises(ValueError, match=words):
        make_engine(**options)


def test_fewer_images_than_a_batch_is_an_error_that_states_it(make_engine, manager):
    with pytest.raises(ValueError, match=r"40 training images do not fill.*\(64\)"):
        make_engine(datamanager=manager(batch_size_train=64))


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

"""``ImageSelConEngine`` evaluates as torchreid does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.engines import BATCH, checkpoints_in, network_of, run, state_of
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.features import BadFeaturesError
from selcon_plugin.torchreid_ext import (
    register_synthetic_persons,
)

torchreid = import_torchreid()


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
        max_rank=10,
        use_cython=False,
    )
    return {"mAP": 100 * mean_ap} | {
        f"Rank-{rank}": 100 * cmc[rank - 1] for rank in (1, 5, 10)
    }


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
    precisions, ranks, lengths = [], [], set()
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
        ranks.append([any(others[:rank]) for rank in (1, 5, 10)])
    assert len(lengths) > 1
    accuracies = 100 * np.mean(ranks, axis=0)
    expected = {"mAP": 100 * np.mean(precisions)} | {
        f"Rank-{rank}": found for rank, found in zip((1, 5, 10), accuracies, strict=True)
    }
    assert engine.results["uneven"] == pytest.approx(expected)


def test_evaluation_only_by_any_distance(make_engine, tmp_path):
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
    engine = make_engine(ema_decay=0.9, iters_per_epoch=2)
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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda rows: rows.index_fill(0, torch.tensor([0]), float("nan")), "not finite"),
        (lambda rows: rows.index_fill(0, torch.tensor([0]), float("inf")), "not finite"),
        (lambda rows: rows[:-1], r"shape \("),
        (lambda rows: rows.flatten(), r"shape \("),
        (lambda rows: rows.long(), "floating-point"),
    ],
)
def test_wrong_features_are_refused(make_engine, tmp_path, fault, message):
    engine = make_engine()
    forward = engine.model.forward
    engine.model.forward = lambda images: fault(forward(images))
    with pytest.raises(BadFeaturesError, match=message):
        run(engine, tmp_path, test_only=True)

"""``ImageSelConEngine`` resumes from its own checkpoints and refuses others'."""

import os
import shutil
import threading

import pytest
import torch

from helpers.checkpoints import assert_equal
from helpers.engines import CLUSTERING, NETWORK, assert_equal_states, checkpoints_in, run
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.io.locks import InUseError
from selcon_plugin.runs.folder import RunExistsError, owned_run
from selcon_plugin.runs.metrics import read_metrics
from selcon_plugin.torchreid_ext import (
    ImageSelConEngine,
    build_selcon_model,
)

torchreid = import_torchreid()


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
            NETWORK, pretrained=False, input_size=(64, 32), num_parts=2
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


def test_engine_continues_where_it_was_resumed(make_engine, tmp_path):
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
    smaller, larger = (
        build_selcon_model(name, pretrained=False, input_size=(64, 32))
        for name in ("osnet_x0_25", "osnet_x0_5")
    )
    run(make_engine(model=smaller, iters_per_epoch=1), tmp_path, 1)
    with pytest.raises(ValueError, match=r"tar-1.*osnet_x0_25 in .*, osnet_x0_5 in"):
        make_engine(model=larger, iters_per_epoch=1).resume(tmp_path)


def test_foreign_and_missing_checkpoints_are_refused(make_engine, tmp_path):
    engine = make_engine()
    file = tmp_path / "softmax.pth.tar"
    torch.save({"state_dict": {}, "epoch": 3, "optimizer": {}}, file)
    with pytest.raises(ValueError, match=r"softmax\.pth\.tar is not a checkpoint of a run"):
        engine.resume(file)
    for missing in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            engine.resume(missing)


def test_new_run_has_no_checkpoint_of_an_earlier_one(make_engine, tmp_path):
    run(make_engine(iters_per_epoch=1), tmp_path, 3)
    before = read_metrics(tmp_path / "metrics.json")
    with pytest.raises(RunExistsError, match="--overwrite"):
        run(make_engine(iters_per_epoch=1), tmp_path, 1)
    assert read_metrics(tmp_path / "metrics.json") == before
    new = make_engine(iters_per_epoch=1, keep_checkpoints=1, overwrite=True)
    run(new, tmp_path, 1)
    assert checkpoints_in(tmp_path) == ["model.pth.tar-1"]
    assert len(list(tmp_path.glob("old-*/model/model.pth.tar-*"))) == 3
    assert max(line["iteration"] for line in read_metrics(tmp_path / "metrics.json")) <= 1
    assert make_engine(iters_per_epoch=1).resume(tmp_path) == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"temperature": 0.5}, "selcon.temperature"),
        ({"ema_decay": 0.5}, "selcon.ema_decay"),
        ({"num_neighbors": 2}, "selcon.num_neighbors"),
        ({"scheduler": "single_step"}, "scheduler"),
        (
            {"clustering": {"eps": 0.3}, "method": "ClusterContrast"},
            "selcon.clustering.eps",
        ),
    ],
)
def test_script_that_changed_is_refused_with_what_changed(
    make_engine, tmp_path, change, key
):
    method = {"method": change["method"]} if "method" in change else {}
    run(make_engine(iters_per_epoch=1, **method), tmp_path, 1)
    with pytest.raises(ValueError, match=rf"cannot resume: .*{key} was .* and is"):
        make_engine(iters_per_epoch=1, **change).resume(tmp_path)
    # What changes no weight of the past may change.
    free = {"keep_checkpoints": 2, "diagnostics_period": 1, "on_nonfinite": "stop"}
    assert make_engine(iters_per_epoch=1, **method, **free).resume(tmp_path) == 1


def test_run_without_a_checkpoint_resumes_from_its_start(make_engine, tmp_path):
    best = tmp_path / "model" / "best_without_labels.pth"
    best.parent.mkdir()
    best.write_text("of a run that was killed before its first checkpoint")
    with pytest.raises(RunExistsError, match=rf"holds a run .model/{best.name}"):
        run(make_engine(iters_per_epoch=1), tmp_path, 1)
    engine = make_engine(iters_per_epoch=1)
    with pytest.raises(FileNotFoundError):
        engine.resume(tmp_path)
    run(engine, tmp_path, 1)
    assert not best.exists()
    assert list(tmp_path.glob(f"old-*/model/{best.name}"))


@pytest.mark.parametrize("period", [1, 0])
def test_evaluation_that_was_killed_is_caught_up_on(
    make_engine, tmp_path, monkeypatch, period
):
    """Of an epoch in between, and of the last one."""
    options = {"iters_per_epoch": 1, "checkpoint_period": period}
    whole = run(make_engine(**options), tmp_path / "whole", 2, eval_freq=1)

    def fail(*_, **__):
        raise MemoryError("evaluation")

    for epoch in (1, 2):
        engine = make_engine(**options)
        if epoch > 1:
            assert engine.resume(tmp_path / "broken") == epoch - 1
        with monkeypatch.context() as patch:
            patch.setattr(ImageSelConEngine, "_evaluate", fail)
            with pytest.raises(MemoryError):
                run(engine, tmp_path / "broken", 2, eval_freq=1)
        engine = make_engine(**options)
        assert engine.resume(tmp_path / "broken") == epoch
        if epoch == 1:
            # What it catches up on is saved, whatever happens next.
            with monkeypatch.context() as patch:
                patch.setattr(ImageSelConEngine, "train", fail)
                with pytest.raises(MemoryError):
                    run(engine, tmp_path / "broken", 2, eval_freq=1)
        else:
            run(engine, tmp_path / "broken", 2, eval_freq=1)
    evaluated = [
        {line["iteration"]: line["mAP"] for line in read_metrics(file) if "mAP" in line}
        for file in (tmp_path / "whole/metrics.json", tmp_path / "broken/metrics.json")
    ]
    assert evaluated[0] == evaluated[1]
    assert list(evaluated[0]) == [0, 1]
    assert engine.results == whole.results
    for epoch in (1, 2):
        name = f"model/model.pth.tar-{epoch}"
        ends = [
            torch.load(tmp_path / place / name, weights_only=True)
            for place in ("whole", "broken")
        ]
        assert_equal(*ends, name)


def test_second_run_in_the_same_folder_at_once_is_refused(make_engine, tmp_path):
    with owned_run(tmp_path):
        refused = []

        def second():
            try:
                run(make_engine(iters_per_epoch=1), tmp_path, 1)
            except InUseError as error:
                refused.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert str(os.getpid()) in refused[0]
    assert list(tmp_path.iterdir()) == []

"""Tests of the warnings: one run for each of them, and a healthy run without any."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from selcon_plugin.report.collect import Curve, RunData, collect_run
from selcon_plugin.report.notes import find_notes


def curve(*values):
    return Curve(tuple(float(i) for i in range(1, len(values) + 1)), values)


def warnings(run):
    return [note.text for note in find_notes(run) if note.level == "warning"]


def test_a_healthy_run_has_no_warning(make_run):
    assert warnings(collect_run(make_run())) == []


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({"num_clusters": curve(5.0, 1.0)}, "in one cluster"),
        ({"num_clusters": curve(0.0)}, "No cluster"),
        ({"outlier_ratio": curve(0.2, 0.75)}, "75 % of the images are outliers"),
        ({"embedding_variance": curve(0.001)}, "nearly the same feature"),
        ({"largest_cluster_ratio": curve(0.8)}, "one cluster holds 80 %"),
        (
            {"total_loss": curve(2.0, 2.0, 2.1, 2.2)},
            "did not decrease: 2 at the start, 2.2",
        ),
        ({"skipped_steps": curve(3.0)}, "3 steps were skipped"),
    ],
)
def test_bad_metrics_give_a_warning(make_run, curves, expected):
    run = collect_run(make_run())
    (text,) = warnings(dataclasses.replace(run, curves={**run.curves, **curves}))
    assert expected in text


@pytest.mark.parametrize(
    ("criterion", "values", "expected"),
    [
        ("cosine_silhouette", (0.2, 0.15, 0.2), 1),
        ("cosine_silhouette", (0.2, 0.25, 0.1), 0),
        ("cosine_silhouette", (0.2,), 0),
        ("outlier_ratio", (0.2, 0.15), 0),
    ],
)
def test_training_that_has_not_made_the_network_better(
    make_run, criterion, values, expected
):
    run = collect_run(make_run())
    run = dataclasses.replace(
        run,
        curves={**run.curves, "cosine_silhouette": curve(*values)},
        settings={**run.settings, "MODEL.SELCON.KEEP_BEST_BY": criterion},
    )
    found = warnings(run)
    assert len(found) == expected
    assert all("0.200 before training, at most 0.200" in text for text in found)


def test_loss_of_warm_up_or_of_fewer_clusters_is_not_compared(make_run):
    run = collect_run(make_run())
    rising = {**run.curves, "total_loss": curve(0.1, 0.1, 0.1, 4.0, 3.9, 3.8, 3.7)}
    rising.pop("num_clusters", None)
    run = dataclasses.replace(run, curves=rising)
    assert "did not decrease" in " ".join(warnings(run))
    settings = {**run.settings, "MODEL.SELCON.WARMUP_EPOCHS": 3}
    assert warnings(dataclasses.replace(run, settings=settings)) == []
    grown = {**rising, "num_clusters": curve(20.0, 30.0)}
    assert warnings(dataclasses.replace(run, curves=grown)) == []


def test_clusters_of_one_camera(make_run):
    run = collect_run(make_run())
    labels = run.images.camids.astype(np.int32)
    record = dataclasses.replace(run.embedding, labels=labels)
    (text,) = warnings(dataclasses.replace(run, embedding=record))
    assert "100 % of the clusters contain images of one camera" in text
    one_camera = dataclasses.replace(run.images, camids=np.zeros_like(run.images.camids))
    assert warnings(dataclasses.replace(run, embedding=record, images=one_camera)) == []


def test_images_that_were_left_out(make_run):
    run = collect_run(make_run())
    images = dataclasses.replace(run.images, num_left_out=2)
    (text,) = warnings(dataclasses.replace(run, images=images))
    assert text.startswith("2 image files")


@pytest.mark.parametrize("labeler", ["DBSCAN", "HDBSCAN", "KMeans"])
@pytest.mark.parametrize("clusters", [0, 1])
def test_remedies_name_options_of_the_labeler(labeler, clusters):
    curves = {"num_clusters": Curve((1.0,), (float(clusters),))}
    settings = {"selcon.clustering.labeler": labeler}
    (note,) = [
        n
        for n in find_notes(RunData(Path("run"), curves=curves, settings=settings))
        if "cluster" in n.text and n.level == "warning"
    ]
    assert ("eps" in note.remedy) == (labeler == "DBSCAN")

"""The best weights without labels: which figures count, and what a resumed run knows."""

import math

import pytest

from selcon_plugin.engine.best_weights import (
    CLUSTER_FIGURES,
    FEATURE_FIGURES,
    BestWeights,
)


def test_weights_are_saved_when_the_figure_rises():
    saved = []
    best = BestWeights("silhouette", saved.append)
    values = [0.2, 0.1, 0.2, math.nan, None, 0.3, -1.0, 0.4]
    for epochs, value in enumerate(values, start=1):
        best.offer(
            {"stability": 9.0} | ({} if value is None else {"silhouette": value}), epochs
        )
    assert saved == [1, 6, 8]


def test_resumed_run_goes_on_from_its_best():
    saved = []
    first, second = BestWeights("silhouette", saved.append), None
    first.offer({"silhouette": 0.5}, 1)
    second = BestWeights("silhouette", saved.append)
    second.load_state_dict(first.state_dict())
    second.offer({"silhouette": 0.4}, 2)
    assert saved == [1]
    other = BestWeights("stability", saved.append)
    other.load_state_dict(first.state_dict())  # of another figure: not comparable
    other.offer({"stability": 0.1}, 3)
    assert saved == [1, 3]


@pytest.mark.parametrize("figure", [*CLUSTER_FIGURES, *FEATURE_FIGURES])
def test_figures_of_clusters_need_clusters(figure):
    best = BestWeights(figure, print)
    best.check(has_clusters=True)
    if figure in FEATURE_FIGURES:
        best.check(has_clusters=False)
        return
    with pytest.raises(ValueError, match=f"keep_best_by {figure} .* choose effective_rank"):
        best.check(has_clusters=False)

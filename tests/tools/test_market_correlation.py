"""Correlation of metrics with mAP, on hand-made runs with known ranks."""

import json
import math

import pytest
from scipy.stats import spearmanr

from market_study.correlation import Evaluation, correlate, read_run, spearman, table


def test_spearman_equals_scipys_with_ties():
    first, second = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, math.nan], [1, 2, 3])],
)
def test_undefined_correlation(first, second):
    assert spearman(first, second) is None


def test_metrics_are_those_nearest_to_an_evaluation(tmp_path):
    """Two epochs of 10 steps: clusters before each, mAP after each."""
    lines = [
        {"iteration": 0, "silhouette": 0.1, "purity": 0.5},
        {"iteration": 9, "mAP": 20.0, "total_loss": 3.0},
        {"iteration": 10, "silhouette": 0.2, "purity": 0.6},
        {"iteration": 19, "mAP": 30.0, "total_loss": 2.0},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "metrics.json").write_text(text)
    found = read_run(tmp_path, {"steps": 20, "metrics": {"Market1501": {"mAP": 30.5}}})
    assert [e.mean_ap for e in found] == [20.0, 30.5]
    assert found[0].metrics == {"silhouette": 0.2, "purity": 0.6, "total_loss": 3.0}
    assert found[1].metrics == {"silhouette": 0.2, "purity": 0.6, "total_loss": 2.0}


def run(mean_aps, **metrics):
    return [
        Evaluation(mean_ap, {name: values[i] for name, values in metrics.items()})
        for i, mean_ap in enumerate(mean_aps)
    ]


def test_across_and_within_runs():
    runs = [
        run([1, 2, 3], silhouette=[1, 2, 3], stability=[3, 2, 1], ami=[1, 1, 1]),
        run([1, 2, 4], silhouette=[3, 2, 1], stability=[3, 2, 1], ami=[1, 2, 3]),
        run([5, 6], silhouette=[9, 8], stability=[1, 5], ami=[1, 9]),
        run([7.0], total_loss=[1.0]),
    ]
    rows = {row.name: row for row in correlate(runs)}
    # The ends: mAP 3, 4, 6 with silhouette 3, 1, 8 and stability 1, 1, 5.
    assert rows["silhouette"].across == pytest.approx(0.5)
    assert rows["stability"].across == pytest.approx(3**0.5 / 2)
    assert rows["silhouette"].within == pytest.approx(0.0)  # +1 and -1
    assert rows["stability"].within == pytest.approx(-1.0)
    assert rows["silhouette"].num_runs == 3
    assert rows["silhouette"].num_within == 2
    assert rows["ami"].num_within == 1  # constant in one run
    assert rows["total_loss"].across is None
    # Metrics that need identities are last, however strong.
    assert list(rows) == ["stability", "silhouette", "total_loss", "ami"]
    assert "| `ami` | identities |" in table(list(rows.values()), len(runs))


def test_gain_of_keeping_the_best():
    def run(*pairs):
        return [Evaluation(mean, {"outlier_ratio": share}) for share, mean in pairs]

    runs = [
        run((0.5, 10.0), (0.2, 30.0), (0.3, 26.0)),  # fewest outliers: 4 above the last
        run((0.5, 10.0), (0.4, 20.0), (0.3, 22.0)),  # the last itself
        [Evaluation(5.0, {})],
    ]
    (row,) = correlate(runs)
    assert row.gain == pytest.approx(2.0)
    assert "| +2.00 |" in table([row], len(runs))

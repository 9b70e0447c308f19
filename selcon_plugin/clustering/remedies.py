"""Remedies for too many or too few clusters, by the options that a labeler has."""

from __future__ import annotations

from collections.abc import Container

# By option: remedy for too few clusters, and for too many or too many outliers.
_REMEDIES = {
    "eps": ("lower eps", "raise eps"),
    "threshold": ("lower threshold", "raise threshold"),
    "min_similarity": ("raise min_similarity", "lower min_similarity"),
    "num_clusters": ("raise num_clusters", "lower num_clusters"),
    "min_cluster_size": ("lower min_cluster_size", "lower min_cluster_size"),
    "min_samples": ("", "lower min_samples"),
}


def more_clusters(options: Container[str]) -> str:
    """Return how to get more, smaller clusters with a labeler of these options."""
    return _remedy(options, 0)


def fewer_outliers(options: Container[str]) -> str:
    """Return how to get fewer outliers with a labeler of these options."""
    return _remedy(options, 1)


def _remedy(options: Container[str], side: int) -> str:
    found = [both[side] for name, both in _REMEDIES.items() if name in options]
    found = [text for text in found if text][:2]
    # DBSCAN and its ensemble can choose eps themselves.
    choice = ["set eps to auto"] if "eps" in options else []
    return " or ".join([*found, *choice]) or "use another labeler"

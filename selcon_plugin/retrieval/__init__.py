"""Retrieval of a person from many images, with an index of features on disk.

This folder holds the index, its files, exact and approximate search and the page of
results. Networks that compute the features belong to ``inference``.
"""

from selcon_plugin.retrieval.index import Index
from selcon_plugin.retrieval.query import search
from selcon_plugin.retrieval.results import Added, Match, QueryResult
from selcon_plugin.retrieval.source import ImageEmbedder, NetworkSource
from selcon_plugin.retrieval.threshold import ThresholdSuggestion, suggest_threshold

__all__ = [
    "Added",
    "ImageEmbedder",
    "Index",
    "Match",
    "NetworkSource",
    "QueryResult",
    "ThresholdSuggestion",
    "search",
    "suggest_threshold",
]

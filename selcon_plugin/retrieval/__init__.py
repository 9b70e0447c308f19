"""Find a person in many images: an index of features on the disk, and searches in it."""

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

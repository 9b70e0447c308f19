"""Find a person in many images: an index of features on the disk, and searches in it."""

from selcon_plugin.retrieval.index import Added, Index, Match, QueryResult, search
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

"""Measures of features and pseudo-labels.

``identities`` is the only module that sees ground-truth identities; nothing here trains.
"""

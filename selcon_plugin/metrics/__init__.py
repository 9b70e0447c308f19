"""Metrics of features and pseudo-labels; none of them is used for training.

``identities`` is the only module that uses ground-truth identities.
"""

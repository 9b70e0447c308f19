"""SyntheticPersons: persons rendered from parametric looks, scenes and cameras.

Training uses no labels; the identities are only for evaluation.
"""

"""SyntheticPersons: persons rendered from parametric looks, scenes and cameras.

No label is used in training; the identities serve evaluation only.
"""

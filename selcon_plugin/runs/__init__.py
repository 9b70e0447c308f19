"""The files of a run's folder: results, metrics, ranked lists, embeddings, checkpoints.

Reading and writing only: no training and no HTML.
"""

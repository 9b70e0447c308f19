"""Files in the folder of a run: results, metrics, ranked lists, embeddings, checkpoints.

These modules only read and write files: no training and no HTML.
"""

"""Networks at work: the embedder, features of a folder, ONNX and export.

No training belongs here, and no search.
"""

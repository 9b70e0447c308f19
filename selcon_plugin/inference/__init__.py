"""Inference with trained networks.

This folder holds the embedder, the features of a folder of images, ONNX inference and
export. Training, search and network modules belong to other folders.
"""

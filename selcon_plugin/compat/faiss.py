"""A patch that lets evaluators of FastReID's projects run with faiss for CPUs."""

from __future__ import annotations

import importlib
import importlib.util
import types
from typing import Any

__all__ = ["offer_gpu_names"]


def offer_gpu_names() -> None:
    """Let the names of faiss' exact indices on a GPU stand for those on a CPU.

    Without it: the evaluator of FastRetri, which uses these names without a check, ends
    with an ``AttributeError`` where ``faiss-cpu`` is installed. The indices are exact, so
    that the results are the same.
    Can be removed when: FastRetri asks for the number of GPUs.
    """
    if importlib.util.find_spec("faiss") is None:
        return
    faiss: Any = importlib.import_module("faiss")
    if hasattr(faiss, "StandardGpuResources"):
        return
    faiss.StandardGpuResources = faiss.GpuIndexFlatConfig = types.SimpleNamespace
    faiss.GpuIndexFlatIP = lambda _, dimension, *__: faiss.IndexFlatIP(dimension)
    faiss.GpuIndexFlatL2 = lambda _, dimension, *__: faiss.IndexFlatL2(dimension)

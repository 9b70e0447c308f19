"""Threads of computation beside processes that read images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@contextlib.contextmanager
def reserve_cpu_core() -> Iterator[None]:
    """Compute on all cores but one, unless OMP_NUM_THREADS says otherwise.

    The threads of one operation wait for each other: where another process, such as the one
    that reads the images, takes the core of one of them, all come to a near standstill.

    Yields:
        Nothing.
    """
    import torch

    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Number of compute threads next to processes that read images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def reserve_cpu_core() -> Iterator[None]:
    """Compute on all cores except one, unless OMP_NUM_THREADS is set.

    The threads of one operation wait for each other. If another process, such as the one
    that reads the images, occupies the core of one of them, all nearly stop.

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

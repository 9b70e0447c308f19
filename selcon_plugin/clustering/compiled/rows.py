"""Compilation and threading of loops over ranges of rows.

Every kernel releases the GIL and writes only data of its own rows, so threads can split the
rows and the result does not depend on the split. Kernels run in plain threads
(:class:`RowThreads`), not under numba's ``parallel=True``, whose threading layers break in
the forked workers of a data loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")


def kernel(function: Function) -> Function:
    """Compile a loop; its machine code is cached on disk between runs."""
    return cast(Function, numba.njit(nogil=True, cache=True)(function))


def _reordering_kernel(function: Function) -> Function:
    # Sums may use any fixed order, which allows the compiler to vectorize them.
    flags = {"reassoc", "contract"}
    return cast(Function, numba.njit(nogil=True, cache=True, fastmath=flags)(function))


class RowThreads:
    """Context manager with a pool of as many threads as torch uses.

    Inside the pool torch runs single-threaded. If its own threads alternated with those of
    the pool, they would occupy the processors with busy waiting (OpenMP's threads spin for
    some milliseconds after each use) while the pool has work.
    """

    def __enter__(self) -> RowThreads:
        self._count = torch.get_num_threads()
        # The setting applies to the calling thread and to threads created later.
        self._pool = ThreadPoolExecutor(
            self._count, initializer=torch.set_num_threads, initargs=(1,)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._count)

    def map(
        self,
        work: Callable[[int, int], Result],
        first: Sequence[int],
        second: Sequence[int],
    ) -> list[Result]:
        """Call ``work`` on pairs of numbers.

        Args:
            work: Function of two numbers that releases the GIL; the calls must be
                independent of each other.
            first: First number of each pair.
            second: Second number of each pair.

        Returns:
            The return values, in order.
        """
        if self._count == 1 or len(first) <= 1:
            return list(map(work, first, second))
        return list(self._pool.map(work, first, second))

    def run(
        self, work: Callable[[int, int], Result], num_rows: int, rows_per_task: int = 512
    ) -> list[Result]:
        """Call ``work(start, stop)`` on ranges that cover all rows.

        Args:
            work: Function of a range of rows that releases the GIL.
            num_rows: Total number of rows.
            rows_per_task: Rows per call; independent of the number of threads.

        Returns:
            The return values, in the order of the rows.
        """
        starts = range(0, num_rows, rows_per_task)
        stops = [min(start + rows_per_task, num_rows) for start in starts]
        return self.map(work, starts, stops)


@_reordering_kernel
def dot(a: Array, b: Array) -> Any:
    """Return the inner product of two float32 vectors."""
    total = np.float32(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total

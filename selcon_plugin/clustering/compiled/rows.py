"""Compiled loops of the clustering engine, each over a range of rows.

Every kernel releases the GIL and writes only what belongs to its own rows, so that threads
can share the rows among them and the result does not depend on how. They run in plain
threads (:class:`RowThreads`), not under numba's ``parallel=True``, whose threading layers
break in the fork()ed workers of a data loader.
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
    """Compile a loop; its machine code is kept on disk between runs."""
    return cast(Function, numba.njit(nogil=True, cache=True)(function))


def _reordering_kernel(function: Function) -> Function:
    # Sums may be taken in any (fixed) order, which lets the compiler use vector registers.
    flags = {"reassoc", "contract"}
    return cast(Function, numba.njit(nogil=True, cache=True, fastmath=flags)(function))


class RowThreads:
    """As many threads as torch uses, to share work among; a context manager.

    Inside them torch works with one thread. Were its own threads used in turn with these,
    they would keep the processors busy waiting (OpenMP's threads spin for some
    milliseconds after each use) while these have work.
    """

    def __enter__(self) -> RowThreads:
        self._count = torch.get_num_threads()
        # The setting is that of the calling thread, and of threads yet to come.
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
            work: Must release the GIL, and the calls must not depend on each other.
            first: First numbers.
            second: Second numbers, as many.

        Returns:
            What the calls return, in order.
        """
        if self._count == 1 or len(first) <= 1:
            return list(map(work, first, second))
        return list(self._pool.map(work, first, second))

    def run(
        self, work: Callable[[int, int], Result], num_rows: int, rows_per_task: int = 512
    ) -> list[Result]:
        """Call ``work(start, stop)`` on ranges that cover all rows.

        Args:
            work: Takes a range of rows; must release the GIL.
            num_rows: Rows in all.
            rows_per_task: Rows of one call; does not depend on the number of threads.

        Returns:
            What the calls return, in the order of the rows.
        """
        starts = range(0, num_rows, rows_per_task)
        stops = [min(start + rows_per_task, num_rows) for start in starts]
        return self.map(work, starts, stops)


@_reordering_kernel
def dot(a: Array, b: Array) -> Any:
    """Inner product of two float32 vectors."""
    total = np.float32(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total

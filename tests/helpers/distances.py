"""Sparse distances as the labelers store them."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from numpy.typing import NDArray


def sparse(dense: NDArray[np.float64]) -> scipy.sparse.csr_array:
    """Store entries below 1, and the diagonal as a tiny number."""
    kept = dense < 1
    np.fill_diagonal(kept, True)
    row, column = np.nonzero(kept)
    data = np.maximum(dense[row, column], 1e-7)
    return scipy.sparse.csr_array((data, (row, column)), shape=dense.shape)

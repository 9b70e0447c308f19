"""Approximate search in large indexes with faiss; its candidates are ranked exactly."""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.installing import install_command
from selcon_plugin.retrieval.exact import Rows

SearchKind = Literal["auto", "flat", "hnsw", "ivf"]

# Up to this number of rows the exact search takes some hundredths of a second on one core.
MAX_FLAT = 100_000
# Beyond this number of rows the graph costs too much memory, and hours to build.
MAX_HNSW = 1_000_000

_LINKS = 32  # edges of the graph per row
_BUILD_BREADTH = 120
_TRAINED_PER_LIST = 64
_MIN_TRAINED_PER_LIST = 39  # below this number faiss warns
_ROWS_AT_ONCE = 65_536

# What a search does at each effort: nodes of the graph that it keeps in view, and fraction
# of the allowed rows that it compares in the nearest lists.
_BREADTHS = (256, 512, 1024)
_RATIOS = (0.125, 0.25, 0.5)
NUM_EFFORTS = len(_BREADTHS)
_MIN_PROBES = 64
# A row in view costs the graph about as much time as so many rows an exact search.
_ROWS_PER_VIEW = 32

logger = logging.getLogger(__name__)


def choose_kind(asked: str, num_images: int) -> str:
    """Choose the kind of search.

    Args:
        asked: Requested ``SearchKind``; ``"auto"`` selects flat up to 100,000 images, HNSW
            up to 1,000,000, and IVF above.
        num_images: Number of images in the index.

    Returns:
        ``"flat"``, ``"hnsw"`` or ``"ivf"``.

    Raises:
        ValueError: If the requested kind does not exist.
        ImportError: If it needs faiss, which is not installed.
    """
    if asked not in get_args(SearchKind):
        known = ", ".join(get_args(SearchKind))
        raise ValueError(f"search must be one of {known}, got {asked!r}")
    has_faiss = importlib.util.find_spec("faiss") is not None
    if asked in ("hnsw", "ivf") and not has_faiss:
        raise ImportError(f"search {asked!r} needs faiss: {install_command('search')}")
    if asked != "auto":
        return asked
    if num_images <= MAX_FLAT:
        return "flat"
    if not has_faiss:
        logger.info(
            "The %d images are searched exactly, because faiss is not installed", num_images
        )
        return "flat"
    return "hnsw" if num_images <= MAX_HNSW else "ivf"


class Approximate:
    """Search for candidates of the nearest rows, in a graph (HNSW) or inverted lists (IVF).

    Rows are stored in half precision, and numbered in the order in which they were added.

    Args:
        index: Index of faiss.
        kind: ``"hnsw"`` or ``"ivf"``.

    Attributes:
        effort: 0 for the fastest search, up to ``NUM_EFFORTS - 1``.
    """

    def __init__(self, index: Any, kind: str) -> None:
        self._index = index
        self.kind = kind
        self.effort = 0
        self._list_of_row = np.zeros(0, dtype=np.int64)

    @classmethod
    def build(cls, kind: str, features: Rows) -> Approximate:
        """Build a search over all rows.

        Args:
            kind: ``"hnsw"`` or ``"ivf"``.
            features: Unit vectors ``(N, D)``, N at least 1.

        Returns:
            The search.
        """
        faiss = _faiss()

        num_rows, dim = features.shape
        half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        if kind == "hnsw":
            index = faiss.IndexHNSWSQ(dim, half, _LINKS, product)
            index.hnsw.efConstruction = _BUILD_BREADTH
            sample = features[:1]
        else:
            lists = min(round(4 * num_rows**0.5), num_rows // _MIN_TRAINED_PER_LIST)
            lists = max(1, lists)
            quantizer = faiss.IndexFlatIP(dim)
            index = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, half, product)
            step = max(1, num_rows // (lists * _TRAINED_PER_LIST))
            sample = features[::step]
        index.train(np.ascontiguousarray(sample, dtype=np.float32))
        made = cls(index, kind)
        made.extend(features)
        return made

    @classmethod
    def load(cls, file: str | Path, kind: str) -> Approximate:
        """Read a file that :meth:`save` has written.

        Args:
            file: Path of the file.
            kind: Kind of the search that it contains.

        Returns:
            The search.
        """
        faiss = _faiss()

        return cls(faiss.read_index(str(file)), kind)

    @property
    def num_rows(self) -> int:
        """Number of rows added so far."""
        return int(self._index.ntotal)

    def extend(self, features: Rows) -> None:
        """Add the rows that the search does not contain yet.

        Args:
            features: All rows, the first of which it contains already.
        """
        for start in range(self.num_rows, len(features), _ROWS_AT_ONCE):
            block = features[start : start + _ROWS_AT_ONCE]
            self._index.add(np.ascontiguousarray(block, dtype=np.float32))

    def save(self, file: str | Path) -> None:
        """Write the search to a file.

        Args:
            file: Path of a new file to which nothing refers yet.
        """
        faiss = _faiss()

        faiss.write_index(self._index, str(file))

    def candidates(
        self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_]
    ) -> list[NDArray[np.int64] | None]:
        """Find rows that are probably the nearest of the allowed ones.

        The breadth of the search follows from the allowed rows: a row that is not allowed
        takes no place in the result.

        Args:
            queries: Unit vectors ``(Q, D)``.
            count: Number of rows per query.
            allowed: Mask of the rows that may be found, shape ``(N,)``.

        Returns:
            For each query ``count`` rows, or all allowed ones if there are fewer; None
            where an exact search is needed.
        """
        if not allowed.any():
            return [np.zeros(0, dtype=np.int64) for _ in queries]
        count = min(count, int(allowed.sum()))
        find = self._find_in_graph if self.kind == "hnsw" else self._find_in_lists
        return find(queries, count, allowed)

    def _find_in_graph(
        self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_]
    ) -> list[NDArray[np.int64] | None]:
        # The nearest rows are found whether they are allowed or not, until enough of them
        # are: a graph that is searched for allowed rows only ends among forbidden ones.
        faiss, num_allowed = _faiss(), int(allowed.sum())
        breadth = _BREADTHS[self.effort]
        depth = max(breadth, math.ceil(1.5 * count * len(allowed) / num_allowed))
        most = max(breadth, num_allowed // _ROWS_PER_VIEW)
        found: list[NDArray[np.int64] | None] = [None] * len(queries)
        pending = np.arange(len(queries))
        while len(pending) and depth <= most:
            options = faiss.SearchParametersHNSW(efSearch=depth)
            nearest = self._index.search(queries[pending], depth, params=options)[1]
            for query, rows in zip(pending, nearest, strict=True):
                rows = rows[rows >= 0]
                usable = rows[allowed[rows]]
                if len(usable) >= count:
                    found[query] = usable[:count]
            pending = np.array([query for query in pending if found[query] is None], int)
            depth *= 2
        return found

    def _find_in_lists(
        self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_]
    ) -> list[NDArray[np.int64] | None]:
        # The nearest lists are probed until they hold enough allowed rows.
        faiss, num_lists = _faiss(), self._index.nlist
        sizes = np.bincount(self._lists()[np.flatnonzero(allowed)], minlength=num_lists)
        order = faiss.downcast_index(self._index.quantizer).search(queries, num_lists)[1]
        reached = np.cumsum(sizes[order], axis=1)
        wanted = max(count, math.ceil(_RATIOS[self.effort] * allowed.sum()))
        probes = np.maximum(1 + (reached < wanted).sum(axis=1), _MIN_PROBES)
        # Queries that probe similarly many lists are searched together.
        probes = np.minimum(2 ** np.ceil(np.log2(probes)).astype(int), num_lists)
        selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        found: list[NDArray[np.int64] | None] = [None] * len(queries)
        for number in np.unique(probes):
            together = np.flatnonzero(probes == number)
            options = faiss.SearchParametersIVF(nprobe=int(number), sel=selector)
            nearest = self._index.search(queries[together], count, params=options)[1]
            for query, rows in zip(together, nearest, strict=True):
                if (rows >= 0).all():
                    found[query] = rows
        return found

    def _lists(self) -> NDArray[np.int64]:
        """Return the inverted list of each row."""
        if len(self._list_of_row) != self.num_rows:
            faiss, lists = _faiss(), self._index.invlists
            self._list_of_row = np.zeros(self.num_rows, dtype=np.int64)
            for number in range(self._index.nlist):
                size = lists.list_size(number)
                if size:
                    rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
                    self._list_of_row[rows] = number
        return self._list_of_row


def _faiss() -> Any:
    import faiss

    return faiss

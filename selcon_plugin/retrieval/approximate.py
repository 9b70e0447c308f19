"""Approximate search in large indexes with faiss; its candidates are ranked exactly."""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

SearchKind = Literal["auto", "flat", "hnsw", "ivf"]

# Up to this number of rows the exact search takes some hundredths of a second on one core.
MAX_FLAT = 100_000
# Beyond this number of rows the graph costs too much memory, and hours to build.
MAX_HNSW = 1_000_000

_LINKS = 32  # edges of the graph per row
_BUILD_BREADTH = 120
_MIN_BREADTH = 256
_TRAINED_PER_LIST = 64
_MIN_TRAINED_PER_LIST = 39  # below this number faiss warns
# Minimum number of inverted lists that a search probes, and fraction of all lists. If a
# part of the rows is excluded, more lists are probed, so that as many rows are compared.
_MIN_PROBES, _PROBED_RATIO = 64, 0.125
_ROWS_AT_ONCE = 65_536

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
        raise ImportError(
            f"search {asked!r} needs faiss: pip install 'selcon_plugin[search]'"
        )
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
    """

    def __init__(self, index: Any, kind: str) -> None:
        self._index = index
        self.kind = kind

    @classmethod
    def build(cls, kind: str, features: NDArray[Any]) -> Approximate:
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

    def extend(self, features: NDArray[Any]) -> None:
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
    ) -> NDArray[np.int64]:
        """Find rows that are probably the nearest.

        Args:
            queries: Unit vectors ``(Q, D)``.
            count: Number of rows per query.
            allowed: Mask of the rows that may be found, shape ``(N,)``.

        Returns:
            Rows ``(Q, count)``, filled with -1 where fewer were found.
        """
        faiss = _faiss()

        selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self.kind == "hnsw":
            breadth = max(_MIN_BREADTH, 2 * count)
            options = faiss.SearchParametersHNSW(efSearch=breadth, sel=selector)
        else:
            lists = self._index.nlist
            wanted = max(_MIN_PROBES, _PROBED_RATIO * lists) / max(allowed.mean(), 1e-6)
            probes = min(lists, math.ceil(wanted))
            options = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        rows: NDArray[np.int64] = self._index.search(queries, count, params=options)[1]
        return rows


def _faiss() -> Any:
    import faiss

    return faiss

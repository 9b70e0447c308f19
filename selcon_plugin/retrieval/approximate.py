"""Approximate search among very many rows, by faiss: candidates, to be ranked exactly."""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

SearchKind = Literal["auto", "flat", "hnsw", "ivf"]

# Rows up to which the exact search takes some hundredths of a second on one core.
MAX_FLAT = 100_000
# Links between rows cost memory and hours to make beyond this.
MAX_HNSW = 1_000_000

_LINKS = 32  # per row
_BUILD_BREADTH = 120
_MIN_BREADTH = 256
_TRAINED_PER_LIST = 64
_MIN_TRAINED_PER_LIST = 39  # below, faiss warns
# Lists that are looked at: so many at least, or such a share of them; more where a part of
# the rows may not be found, so that as many may.
_MIN_PROBES, _PROBED_RATIO = 64, 0.125
_ROWS_AT_ONCE = 65_536

logger = logging.getLogger(__name__)


def choose_kind(asked: str, num_images: int) -> str:
    """Choose how to search.

    Args:
        asked: A ``SearchKind``; ``"auto"`` for flat up to 100,000 images, HNSW up to
            1,000,000, IVF above.
        num_images: Images in the index.

    Returns:
        ``"flat"``, ``"hnsw"`` or ``"ivf"``.

    Raises:
        ValueError: If there is no such kind.
        ImportError: If faiss was asked for and is not installed.
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
        logger.info("%d images are searched exactly: faiss is missing", num_images)
        return "flat"
    return "hnsw" if num_images <= MAX_HNSW else "ivf"


class Approximate:
    """Candidates for the nearest rows, from a graph (HNSW) or inverted lists (IVF).

    Rows are kept in half precision, and numbered in the order of being added.

    Args:
        index: faiss' index.
        kind: ``"hnsw"`` or ``"ivf"``.
    """

    def __init__(self, index: Any, kind: str) -> None:
        self._index = index
        self.kind = kind

    @classmethod
    def build(cls, kind: str, features: NDArray[Any]) -> Approximate:
        """Make one of all rows.

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
        """Read what :meth:`save` wrote.

        Args:
            file: The file.
            kind: What it holds.

        Returns:
            The search.
        """
        faiss = _faiss()

        return cls(faiss.read_index(str(file)), kind)

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return int(self._index.ntotal)

    def extend(self, features: NDArray[Any]) -> None:
        """Add the rows that are not in it yet.

        Args:
            features: All rows, of which the first ones are in it.
        """
        for start in range(self.num_rows, len(features), _ROWS_AT_ONCE):
            block = features[start : start + _ROWS_AT_ONCE]
            self._index.add(np.ascontiguousarray(block, dtype=np.float32))

    def save(self, file: str | Path) -> None:
        """Write it to a file.

        Args:
            file: A name that nothing refers to yet.
        """
        faiss = _faiss()

        faiss.write_index(self._index, str(file))

    def candidates(
        self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Find rows that are probably the nearest.

        Args:
            queries: Unit vectors ``(Q, D)``.
            count: Rows per query.
            allowed: Which rows may be found, shape ``(N,)``.

        Returns:
            Rows ``(Q, count)``; -1 where fewer were found.
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

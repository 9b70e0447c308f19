"""The approximate search of an index on disk: built, extended, measured and loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from selcon_plugin.io.integrity import file_checksum, verify_file
from selcon_plugin.retrieval.approximate import Approximate, choose_kind
from selcon_plugin.retrieval.nearest import Recall, calibrate
from selcon_plugin.retrieval.rows import Snapshot
from selcon_plugin.retrieval.store import Store

logger = logging.getLogger(__name__)

# Maximum number of new rows that are searched exactly before the approximate search is
# extended by them.
_MAX_TAIL = 10_000
# Recall is measured again when the number of images has changed by this ratio.
_CHANGED_RATIO = 0.2


class StoredSearch:
    """Approximate search of an index.

    Args:
        store: Files of the index.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loaded: tuple[str, Approximate] | None = None

    def get(self, state: Snapshot) -> Approximate | None:
        """Return the approximate search; None if the index is searched exactly.

        Args:
            state: The index.
        """
        recall = recall_of(state)
        return self._load(state) if recall is not None and recall.is_enough else None

    def maintain(self, *, repair: bool = False) -> None:
        """Rewrite the files if most rows are removed; keep the search up to date.

        Args:
            repair: Whether to replace a search whose file is damaged.
        """
        store = self._store
        if 2 * store.num_live < store.manifest.num_rows:
            store.rewrite()
        state = store.state
        kind = choose_kind(state.manifest.search, state.num_live)
        made = state.manifest.approximate
        if kind == "flat" or not state.num_live:
            if made:
                store.set_approximate({})
            return
        is_usable = bool(made) and made["kind"] == kind
        if repair and is_usable:
            is_usable = self._load(state) is not None
        is_recent = is_usable and len(state.features) - made["num_rows"] <= _MAX_TAIL
        if is_recent and _is_measured(state):
            return
        search = self._load(state) if is_usable else None
        if search is None:
            logger.info("Building the search %s of %d images", kind, len(state.features))
            search = Approximate.build(kind, state.features)
            made = {}
        elif not is_recent:
            search.extend(state.features)
            made = {}
        self._save(search, state, made)

    def _save(self, search: Approximate, state: Snapshot, made: dict[str, Any]) -> None:
        """Measure a search, and write it unless it is the one on disk."""
        recall = calibrate(search, state)
        if not recall.is_enough:
            logger.warning(
                "The search %s finds too little in this index (%s), which is therefore "
                "searched exactly: another --search may be faster",
                *(search.kind, recall),
            )
        if not made:
            name = (
                f"approximate-{search.kind}-{state.manifest.generation}-"
                f"{search.num_rows}.faiss"
            )
            if name == state.manifest.approximate.get("file"):
                self._store.set_approximate({})  # a damaged one, which is replaced
            file = self._store.create_file(name)
            search.save(file)
            made = {"kind": search.kind, "file": name, "num_rows": search.num_rows}
            made["checksum"] = file_checksum(file)
        measured = {"recall": asdict(recall), "effort": search.effort}
        self._store.set_approximate({**made, **measured})
        self._loaded = (_identity(made), search)

    def _load(self, state: Snapshot) -> Approximate | None:
        """Load the search; None if it cannot be used."""
        made = state.manifest.approximate
        name = _identity(made)
        if self._loaded is None or self._loaded[0] != name:
            file = self._store.folder / made["file"]
            try:
                verify_file(file, made.get("checksum"))
                search = Approximate.load(file, made["kind"])
            except (ImportError, RuntimeError, OSError, ValueError) as error:
                # faiss is not installed here, the file is damaged, or another process has
                # just replaced it.
                logger.warning(
                    "The search is exact, which takes longer, until selcon index is run "
                    "again: %s",
                    error,
                )
                return None
            self._loaded = (name, search)
        search = self._loaded[1]
        search.effort = int(made.get("effort", 0))
        return search


def _identity(made: Mapping[str, object]) -> str:
    return f"{made['file']} {made.get('checksum')}"


def recall_of(state: Snapshot) -> Recall | None:
    """Return the measured recall of an index's approximate search, None without one.

    Args:
        state: The index.
    """
    measured = state.manifest.approximate.get("recall")
    return None if measured is None else Recall(**measured)


def _is_measured(state: Snapshot) -> bool:
    """Return whether the recall was measured on about as many images."""
    before = recall_of(state)
    if before is None:
        return False
    changed = abs(state.num_live - before.num_images)
    return changed <= _CHANGED_RATIO * before.num_images

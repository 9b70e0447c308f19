"""``Index``: features of many images on disk, for the retrieval of persons.

    index = Index.create("logs/index", embedder)
    index.add("crops", embedder)
    for result in search(index, ["query.jpg"], embedder=embedder):
        print(result.matches[0].path)

Shape shorthand in this module:

    N: rows of the index, including removed ones
    Q: queries
    D: feature dimension
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.engine.image_check import check_unreadable_ratio
from selcon_plugin.features import check_features
from selcon_plugin.inference.arguments import (
    check_cosine,
    check_count,
    check_folder,
    check_texts,
)
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.renamed import accept_old_arguments
from selcon_plugin.retrieval.approximate import SearchKind, choose_kind
from selcon_plugin.retrieval.centering import CenteredFeatures
from selcon_plugin.retrieval.exact import search_exactly
from selcon_plugin.retrieval.images import images_below
from selcon_plugin.retrieval.nearest import Recall, find_nearest
from selcon_plugin.retrieval.results import Added, Match
from selcon_plugin.retrieval.rows import Snapshot
from selcon_plugin.retrieval.source import (
    ImageEmbedder,
    NetworkSource,
    probe_answers,
    same_network,
)
from selcon_plugin.retrieval.store import Manifest, Store
from selcon_plugin.retrieval.stored_search import StoredSearch, recall_of
from selcon_plugin.retrieval.threshold import ThresholdSuggestion
from selcon_plugin.retrieval.threshold_sample import suggest_for_rows
from selcon_plugin.retrieval.update import plan_update, read_images

logger = logging.getLogger(__name__)


class Index:
    """Index of the features of many images, stored in a folder.

    Open one with :meth:`create` or :meth:`open`. An open index follows the changes of other
    processes, and a killed process loses no stored image. All files are checked against
    their checksums before their content is used.

    Args:
        store: Files of the index.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._search = StoredSearch(store)
        self._offsets: tuple[Snapshot, CenteredFeatures] | None = None

    @classmethod
    def create(
        cls,
        folder: str | Path,
        embedder: ImageEmbedder,
        *,
        source: NetworkSource | None = None,
        fp16: bool = False,
        kind: SearchKind = "auto",
    ) -> Index:
        """Create an empty index for the features of one network.

        Args:
            folder: New or empty folder.
            embedder: Network of the index.
            source: Source of the network, for searches without a given network.
            fp16: Whether to store features in half precision, which halves the size and
                changes cosines by at most some 1e-4.
            kind: Kind of search: ``"flat"`` is exact; ``"hnsw"`` and ``"ivf"`` are
                approximate with faiss, and their candidates are ranked exactly. ``"auto"``
                selects flat up to 100,000 images, HNSW up to 1,000,000, and IVF above, or
                flat without faiss.

        Returns:
            The index.

        Raises:
            ValueError: If the folder is not empty or cannot be written, or if the kind
                does not exist.
            ImportError: If the kind needs faiss, which is not installed.
        """  # noqa: DOC502  (raised by the functions called here)
        choose_kind(kind, 0)
        check_output_folder("folder", os.path.expanduser(check_folder("folder", folder)))
        dim = check_count("the embedder's dim", embedder.dim)
        network = {}
        if source is not None:
            source = source.absolute()
            network = {**asdict(source), "sha256": source.sha256()}
        manifest = Manifest(
            dim=dim,
            dtype="float16" if fp16 else "float32",
            search=kind,
            network=network,
            probe=probe_answers(embedder).tolist(),
        )
        return cls(Store.create(check_folder("folder", folder), manifest))

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open an index.

        Args:
            folder: Folder of the index.

        Returns:
            The index.

        Raises:
            FileNotFoundError: If there is no index.
            ValueError: If the index is damaged.
        """  # noqa: DOC502  (raised by the functions called here)
        return cls(Store.open(check_folder("folder", folder)))

    def __len__(self) -> int:
        return self._store.num_live

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return self._store.manifest.dim

    @property
    def paths(self) -> list[str]:
        """Paths of all images, in the order in which they were added."""
        state = self._store.state
        return [state.images[row].path for row in np.flatnonzero(state.live).tolist()]

    @property
    def cameras(self) -> list[str]:
        """Sorted names of the cameras."""
        return list(self._store.state.camera_names)

    @property
    def kind(self) -> str:
        """Kind of search: ``"flat"``, ``"hnsw"`` or ``"ivf"``."""
        return str(self._store.manifest.approximate.get("kind", "flat"))

    @property
    def recall(self) -> Recall | None:
        """Measured recall of the approximate search; None for an exact search."""
        return recall_of(self._store.state)

    @property
    def source(self) -> NetworkSource | None:
        """Source of the network; None if it was not recorded."""
        known = dict(self._store.manifest.network)
        if not known:
            return None
        del known["sha256"]
        return NetworkSource(**{**known, "options": tuple(known["options"])})

    def __str__(self) -> str:
        recall = self.recall
        if recall is None:
            how = "flat (exact)"
        elif recall.is_enough:
            how = f"{self.kind} (approximate, ranked exactly; {recall})"
        else:
            how = f"flat (exact, because {self.kind} would find too little: {recall})"
        return (
            f"{len(self)} images, {self.dim} values in {self._store.manifest.dtype}, "
            f"search {how}"
        )

    def check_network(self, embedder: ImageEmbedder) -> None:
        """Refuse a network other than the one that the index was created with.

        A network is identified by its features of four fixed patterns: an export of the
        network passes, but the same weights at another input size do not.

        Args:
            embedder: Network to check.

        Raises:
            ValueError: If it is another network.
        """
        before = np.array(self._store.manifest.probe, dtype=np.float32)
        if not same_network(before, probe_answers(embedder)):
            made_with = self._store.manifest.network
            file = made_with.get("weights") or made_with.get("onnx") or "unknown"
            digest = made_with.get("sha256", "")[:12] or "unknown"
            raise ValueError(
                f"the index in {self._store.folder} was created with another network (file "
                f"{file}, SHA-256 {digest}...), whose features cannot be compared with "
                "those of this one: use that network, or create a new index"
            )

    @accept_old_arguments
    def add(
        self,
        folder: str | Path,
        embedder: ImageEmbedder,
        *,
        camera_pattern: str = "",
        batch_size: int = 64,
        max_unreadable_ratio: float = 0.05,
        show_progress: bool = False,
    ) -> Added:
        """Add the images below a folder, and update those that the index knows of it.

        Afterwards the index contains each image below the folder once and as it is now:
        only new images and those whose content has changed are read by the network, moved
        files and other cameras are recorded, and files that are gone are removed. A file
        is identified by its path without symbolic links. To resume a call that was killed,
        repeat it. Features that are damaged on disk are computed again.

        Args:
            folder: Folder, which is searched recursively.
            embedder: Network of the index.
            camera_pattern: Pattern that finds the camera in a path below the folder, as for
                ``selcon_plugin.datasets.read_image_folder``. Unlike in training, a single
                camera is recorded as well. Another pattern than before changes the cameras
                of known images.
            batch_size: Images computed together.
            max_unreadable_ratio: Fraction of the images that may be unreadable; they are
                left out.
            show_progress: Whether to show a progress bar.

        Returns:
            Numbers of images by what happened to them.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If it contains no images, or the network is another one.
            BadFeaturesError: If the network does not return a unit vector per image.
            BadImagesError: If too many images are unreadable; those added before stay.
            InUseError: If another process changes the index for more than 30 s.
        """  # noqa: DOC502  (raised by the functions called here)
        batch_size = check_count("batch_size", batch_size)
        self.check_network(embedder)
        found = images_below(
            check_folder("folder", folder), camera_pattern, progress=show_progress
        )
        with self._store.writing():
            damaged = self._drop_damaged()
            update = plan_update(
                self._store.state, found, default_cameras=not camera_pattern
            )
            faults = read_images(
                self._store,
                update,
                embedder,
                batch_size=batch_size,
                check=partial(
                    check_unreadable_ratio,
                    num_images=len(found.images),
                    max_unreadable_ratio=max_unreadable_ratio,
                    all_read=False,
                ),
                show_progress=show_progress,
            )
            lost = [update.instead_of[key] for key in faults if key in update.instead_of]
            self._store.append(
                np.zeros((0, self.dim), dtype=np.float32),
                [],
                instead_of=[*update.vanished, *lost],
                replaced=update.replaced,
            )
            self._maintain(repair=True)
        changed = len(update.instead_of) - len(lost)
        return Added(
            new=len(update.to_read) - len(faults) - changed,
            changed=changed,
            known=update.num_known,
            unreadable=tuple(faults.values()),
            removed=len(update.vanished) + len(lost),
            moved=update.num_moved,
            relabeled=update.num_relabeled,
            repaired=damaged,
        )

    def _drop_damaged(self) -> int:
        """Drop rows whose features differ from what was written; return their number."""
        state = self._store.state
        damaged = [row for row in state.features.damaged_rows() if state.live[row]]
        if not damaged:
            return 0
        logger.warning(
            "The features of %d images are damaged on disk and are computed again, if "
            "their files lie in this folder, for instance of %s",
            len(damaged),
            state.images[damaged[0]].path,
        )
        self._store.remove(damaged)
        self._store.rewrite()
        return len(damaged)

    def remove(self, pattern: str) -> int:
        """Remove the images whose path matches a pattern; their files are not touched.

        Args:
            pattern: Shell pattern, which is compared with the end of the path: ``"*.png"``,
                ``"cam3/*"``; an absolute pattern is compared with the whole path.

        Returns:
            Number of removed images.

        Raises:
            ValueError: If the pattern matches no image.
        """
        pattern = check_folder("the pattern of images to remove", pattern)
        below = os.path.join(os.path.realpath(pattern), "") if pattern else ""
        with self._store.writing():
            state = self._store.state
            rows = [
                row
                for row in np.flatnonzero(state.live).tolist()
                if PurePath(state.images[row].path).match(pattern)
                or (os.path.isabs(pattern) and state.images[row].key.startswith(below))
            ]
            if not rows:
                example = next(iter(self.paths), None)
                hint = f", for instance not {example!r}" if example else ""
                raise ValueError(
                    f"the pattern {pattern!r} matches none of the {len(self)} images of "
                    f"the index{hint}"
                )
            self._store.remove(rows)
            self._maintain()
        return len(rows)

    def _maintain(self, *, repair: bool = False) -> None:
        """Keep files and approximate search up to date with the rows."""
        self._search.maintain(repair=repair)

    def search(
        self,
        features: NDArray[np.float32],
        *,
        top: int = 10,
        camera: Sequence[str] = (),
        not_camera: Sequence[str] = (),
        threshold: float = -1.0,
        leave_out: Sequence[str] = (),
        center_cameras: bool = False,
        query_cameras: Sequence[str | None] = (),
    ) -> list[tuple[Match, ...]]:
        """Find the images nearest to query features.

        Args:
            features: Unit vectors of the queries, shape ``(Q, D)``.
            top: Maximum number of results per query.
            camera: Cameras to search; empty for all.
            not_camera: Cameras to exclude.
            threshold: Smallest cosine of a result.
            leave_out: For each query a file to exclude, such as the query itself.
            center_cameras: Whether to center the features per camera, as
                :func:`selcon_plugin.clustering.camera_centering.center_cameras` does, with
                the means of the index. Such a search is exact.
            query_cameras: For each query its camera, for centering; None where unknown:
                that query is not centered. Empty if no camera is known.

        Returns:
            The matches of each query, most similar first; among equal ones, the one that
            was added first.

        Raises:
            ValueError: If the features have another dimension or are not finite, ``top`` is
                below 1, no image has one of the cameras, or fewer than two cameras have
                the 100 images that centering needs.
        """  # noqa: DOC502  (raised by the functions called here)
        top = check_count("top", top)
        threshold = check_cosine("threshold", threshold)
        queries = check_features(features, source="the features of queries", dim=self.dim)
        _check_per_query("leave_out", leave_out, len(queries), "paths")
        _check_per_query("query_cameras", query_cameras, len(queries), "names of cameras")
        state = self._store.state
        allowed = state.allowed(
            check_texts("camera", camera), check_texts("not_camera", not_camera)
        )
        # One more result, because one may be left out. There are no more than images, and
        # the memory of the search grows with the number.
        count = min(top, max(state.num_live, 1)) + bool(leave_out)
        if center_cameras:
            state.check_cameras([name for name in query_cameras if name is not None])
            centered = self._centered(state)
            queries = centered.center(queries, query_cameras or [None] * len(queries))
            similarity, rows = search_exactly(
                queries, centered, np.flatnonzero(allowed), count
            )
        else:
            search = self._search.get(state)
            similarity, rows = find_nearest(state, search, queries, allowed, count)
        results = []
        for number in range(len(queries)):
            own = (
                os.path.realpath(path) if leave_out and (path := leave_out[number]) else ""
            )
            matches = [
                Match(state.images[row].path, float(value), state.images[row].camera)
                for value, row in zip(similarity[number], rows[number], strict=True)
                if row >= 0 and value >= threshold and state.images[row].key != own
            ]
            results.append(tuple(matches[:top]))
        return results

    def suggest_threshold(
        self, *, across_cameras: bool = False, center_cameras: bool = False
    ) -> ThresholdSuggestion:
        """Suggest a similarity threshold for the same person, without labels.

        Args:
            across_cameras: Whether the searches are in other cameras than the query's: only
                images of different cameras are compared. Without two known cameras all are
                compared.
            center_cameras: Whether the searches are in centered features.

        Returns:
            Result of :func:`selcon_plugin.retrieval.suggest_threshold` for 256 images that
            are evenly spaced over the index, with up to 1024 nearest neighbors each. If it
            is not clear, the threshold is the cosine that as many pairs reach as there are
            matches by estimate.

        Raises:
            ValueError: If the index has fewer than 3 images, or is to be centered and has
                too few images per camera.
        """
        state = self._store.state
        rows = np.flatnonzero(state.live)
        cameras: NDArray[np.object_] | None = None
        if across_cameras and len(state.camera_names) > 1:
            is_known = state.cameras[rows] != None  # noqa: E711
            if is_known.sum() >= 3:
                rows, cameras = rows[is_known], state.cameras
        if len(rows) < 3:
            raise ValueError(
                f"a suggested threshold needs an index of at least 3 images, not "
                f"{len(rows)}: give the threshold as a number"
            )
        features = self._centered(state) if center_cameras else state.features
        return suggest_for_rows(features, rows, cameras)

    def cameras_of(self, files: Sequence[str]) -> list[str | None]:
        """Return the camera of each file; None where it is unknown or not in the index.

        Args:
            files: Paths of images.
        """
        state = self._store.state
        row_of, _ = state.rows_by_key()
        rows = [row_of.get(os.path.realpath(file)) if file else None for file in files]
        return [None if row is None else state.images[row].camera for row in rows]

    def _centered(self, state: Snapshot) -> CenteredFeatures:
        """Return the centered features; their offsets are computed once per state."""
        if self._offsets is None or self._offsets[0] is not state:
            self._offsets = state, CenteredFeatures(state)
        return self._offsets[1]


def _check_per_query(name: str, values: Any, count: int, kind: str) -> None:
    if isinstance(values, (str, os.PathLike)) or len(values) not in (0, count):
        raise ValueError(
            f"{name} must be a list of {count} {kind}, one per query, got {values!r}"
        )

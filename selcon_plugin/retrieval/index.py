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
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from selcon_plugin.engine.image_check import check_unreadable_ratio
from selcon_plugin.renamed import accept_old_arguments
from selcon_plugin.retrieval.approximate import Approximate, SearchKind, choose_kind
from selcon_plugin.retrieval.exact import search_exactly
from selcon_plugin.retrieval.images import images_below, read_ahead
from selcon_plugin.retrieval.results import Added, Match
from selcon_plugin.retrieval.source import (
    ImageEmbedder,
    NetworkSource,
    probe_answers,
    same_network,
)
from selcon_plugin.retrieval.store import IndexedImage, Manifest, Store
from selcon_plugin.retrieval.threshold import (
    LONGEST_LIST,
    ThresholdSuggestion,
    suggest_threshold,
)

logger = logging.getLogger(__name__)

_IMAGES_PER_COMMIT = 4096
# Maximum number of new rows that are searched exactly before the approximate search is
# extended by them.
_MAX_TAIL = 10_000
# Candidates of the approximate search that are ranked exactly, per result.
_CANDIDATES_PER_RESULT = 4
_MIN_CANDIDATES = 64
_SAMPLED_QUERIES = 256  # images from which a threshold is suggested


class Index:
    """Index of the features of many images, stored in a folder.

    Open one with :meth:`create` or :meth:`open`. The cost of adding and removing depends on
    the number of added or removed images only, and a killed process loses no stored image.

    Args:
        store: Files of the index.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loaded: tuple[str, Approximate] | None = None

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
            ValueError: If the folder is not empty, or the kind does not exist.
            ImportError: If the kind needs faiss, which is not installed.
        """  # noqa: DOC502  (raised by the functions called here)
        choose_kind(kind, 0)
        network = {}
        if source is not None:
            source = source.absolute()
            network = {**asdict(source), "sha256": source.sha256()}
        manifest = Manifest(
            dim=embedder.dim,
            dtype="float16" if fp16 else "float32",
            search=kind,
            network=network,
            probe=probe_answers(embedder).tolist(),
        )
        return cls(Store.create(folder, manifest))

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
        return cls(Store.open(folder))

    def __len__(self) -> int:
        return self._store.num_live

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return self._store.manifest.dim

    @property
    def paths(self) -> list[str]:
        """Paths of all images, in the order in which they were added."""
        return [self._store.images[row].path for row in np.flatnonzero(self._store.live)]

    @property
    def cameras(self) -> list[str]:
        """Sorted names of the cameras."""
        rows = np.flatnonzero(self._store.live)
        found = {self._store.images[row].camera for row in rows}
        return sorted(camera for camera in found if camera is not None)

    @property
    def kind(self) -> str:
        """Kind of search: ``"flat"``, ``"hnsw"`` or ``"ivf"``."""
        return str(self._store.manifest.approximate.get("kind", "flat"))

    @property
    def source(self) -> NetworkSource | None:
        """Source of the network; None if it was not recorded."""
        known = dict(self._store.manifest.network)
        if not known:
            return None
        del known["sha256"]
        return NetworkSource(**{**known, "options": tuple(known["options"])})

    def __str__(self) -> str:
        exact = "exact" if self.kind == "flat" else "approximate, ranked exactly"
        return (
            f"{len(self)} images, {self.dim} values in {self._store.manifest.dtype}, "
            f"search {self.kind} ({exact})"
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
        """Add the images below a folder.

        Images that are in the index already, and whose file has not changed since, are
        skipped. To resume a call that was killed, repeat it.

        Args:
            folder: Folder, which is searched recursively.
            embedder: Network of the index.
            camera_pattern: Pattern that finds the camera in a path below the folder, as for
                ``selcon_plugin.datasets.read_image_folder``. Unlike in training, a single
                camera is recorded as well.
            batch_size: Images computed together.
            max_unreadable_ratio: Fraction of the images that may be unreadable; they are
                left out.
            show_progress: Whether to show a progress bar.

        Returns:
            Numbers of added, changed, known and unreadable images.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If it contains no images, or the network is another one.
            BadImagesError: If too many images are unreadable; those added before stay.
        """  # noqa: DOC502  (raised by the functions called here)
        if batch_size < 1:
            raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size}")
        self.check_network(embedder)
        found = images_below(folder, camera_pattern)
        with self._store.writing():
            live = self._store.live
            known = {
                image.path: row for row, image in enumerate(self._store.images) if live[row]
            }
            todo = [i for i in found if not self._has(known, i)]
            replaced = {i.path: known[i.path] for i in todo if i.path in known}
            faults: list[str] = []
            bar = tqdm(
                total=len(todo), desc="images", unit="img", disable=not show_progress
            )
            images: list[IndexedImage] = []
            features: list[NDArray[np.float32]] = []
            with bar:
                for batch in read_ahead(todo, batch_size):
                    good = [pair for pair in batch if not isinstance(pair[1], str)]
                    faults += [fault for _, fault in batch if isinstance(fault, str)]
                    if good:
                        pixels = [pixel for _, pixel in good]
                        features.append(embedder(pixels, batch_size=batch_size))
                        images += [image for image, _ in good]
                    if len(images) >= _IMAGES_PER_COMMIT:
                        self._commit(images, features, replaced)
                    bar.update(len(batch))
                    check_unreadable_ratio(
                        faults, len(found), max_unreadable_ratio, all_read=False
                    )
            self._commit(images, features, replaced)
            self._maintain()
        unreadable = {fault.partition(": ")[0] for fault in faults}
        changed = sum(path not in unreadable for path in replaced)
        new = len(todo) - len(faults) - changed
        return Added(new, changed, len(found) - len(todo), tuple(faults))

    def _has(self, known: dict[str, int], image: IndexedImage) -> bool:
        row = known.get(image.path)
        if row is None:
            return False
        before = self._store.images[row]
        return (before.size, before.changed) == (image.size, image.changed)

    def _commit(
        self,
        images: list[IndexedImage],
        features: list[NDArray[np.float32]],
        replaced: dict[str, int],
    ) -> None:
        if not images:
            return
        rows = [replaced[image.path] for image in images if image.path in replaced]
        self._store.append(np.concatenate(features), images, instead_of=rows)
        images.clear()
        features.clear()

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
        if not pattern:
            raise ValueError("the pattern of images to remove is empty")
        with self._store.writing():
            rows = [
                int(row)
                for row in np.flatnonzero(self._store.live)
                if PurePosixPath(self._store.images[row].path).match(pattern)
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

    def _maintain(self) -> None:
        """Rewrite the files if most rows are removed; build or extend the search."""
        store = self._store
        if 2 * store.num_live < store.manifest.num_rows:
            store.rewrite()
        kind = choose_kind(store.manifest.search, store.num_live)
        made = store.manifest.approximate
        if kind == "flat" or not store.num_live:
            if made:
                store.set_approximate({})
            return
        features = store.features()
        if made and made["kind"] == kind:
            if len(features) - made["num_rows"] <= _MAX_TAIL:
                return
            search = Approximate.load(store.folder / made["file"], kind)
            search.extend(features)
        else:
            logger.info("Building the search %s of %d images", kind, len(features))
            search = Approximate.build(kind, features)
        name = f"approximate-{kind}-{store.manifest.generation}-{len(features)}.faiss"
        search.save(store.folder / name)
        store.set_approximate({"kind": kind, "file": name, "num_rows": len(features)})

    def search(
        self,
        features: NDArray[np.float32],
        *,
        top: int = 10,
        camera: Sequence[str] = (),
        not_camera: Sequence[str] = (),
        threshold: float = -1.0,
        leave_out: Sequence[str] = (),
    ) -> list[tuple[Match, ...]]:
        """Find the images nearest to query features.

        Args:
            features: Unit vectors of the queries, shape ``(Q, D)``.
            top: Maximum number of results per query.
            camera: Cameras to search; empty for all.
            not_camera: Cameras to exclude.
            threshold: Smallest cosine of a result.
            leave_out: For each query a file to exclude, such as the query itself.

        Returns:
            The matches of each query, most similar first; among equal ones, the one that
            was added first.

        Raises:
            ValueError: If the features have another dimension or are not finite, ``top`` is
                below 1, or no image has one of the cameras.
        """
        queries = np.asarray(features, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"the features of queries must have shape (Q, {self.dim}), got "
                f"{queries.shape}"
            )
        if not np.isfinite(queries).all():
            raise ValueError("the features of queries are not finite")
        if top < 1:
            raise ValueError(f"top must be 1 or more, got {top}")
        images = self._store.images
        # One more result, because one may be left out.
        similarity, rows = self._nearest(
            queries, self._allowed(camera, not_camera), top + bool(leave_out)
        )
        results = []
        for number in range(len(queries)):
            own = os.path.abspath(leave_out[number]) if leave_out else None
            matches = [
                Match(images[row].path, float(value), images[row].camera)
                for value, row in zip(similarity[number], rows[number], strict=True)
                if row >= 0 and value >= threshold and images[row].path != own
            ]
            results.append(tuple(matches[:top]))
        return results

    def suggest_threshold(self) -> ThresholdSuggestion:
        """Suggest a similarity threshold for the same person, without labels.

        Returns:
            Result of :func:`selcon_plugin.retrieval.suggest_threshold` for 256 images that
            are evenly spaced over the index, with up to 1024 nearest neighbors each.

        Raises:
            ValueError: If the index has fewer than 3 images.
        """
        live = self._store.live
        rows = np.flatnonzero(live)
        if len(rows) < 3:
            raise ValueError(
                f"a suggested threshold needs an index of at least 3 images, not "
                f"{len(rows)}: give the threshold as a number"
            )
        count = min(_SAMPLED_QUERIES, len(rows))
        sample = rows[np.arange(count) * len(rows) // count]
        queries = self._store.features()[sample].astype(np.float32)
        similarity, found = search_exactly(
            queries, self._store.features(), rows, min(LONGEST_LIST + 1, len(rows))
        )
        itself = found == sample[:, None]
        itself[~itself.any(axis=1), -1] = True  # the image has too many duplicates
        return suggest_threshold(similarity[~itself].reshape(count, -1))

    def _allowed(
        self, camera: Sequence[str], not_camera: Sequence[str]
    ) -> NDArray[np.bool_]:
        allowed = self._store.live
        if not camera and not not_camera:
            return allowed
        known = self.cameras
        for name in (*camera, *not_camera):
            if name not in known:
                raise ValueError(
                    f"no image of the index is from camera {name!r}; its cameras are "
                    f"{', '.join(known) or 'none'}"
                )
        names = [image.camera for image in self._store.images]
        if camera:
            allowed &= np.array([name in camera for name in names], dtype=bool)
        allowed &= np.array([name not in not_camera for name in names], dtype=bool)
        return allowed

    def _nearest(
        self, queries: NDArray[np.float32], allowed: NDArray[np.bool_], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the nearest rows, with similarity -inf and row -1 where there are fewer."""
        features, made = self._store.features(), self._store.manifest.approximate
        rows = np.flatnonzero(allowed)
        # A small subset of the rows is searched exactly: a graph would hardly reach it.
        few = 10 * len(rows) <= self._store.num_live
        search = self._approximate() if made and not few else None
        if search is None:
            return search_exactly(queries, features, rows, count)
        tail = rows[rows >= search.num_rows]
        similarity, found = search_exactly(queries, features, tail, count)
        wanted = max(_MIN_CANDIDATES, _CANDIDATES_PER_RESULT * count)
        candidates = search.candidates(queries, wanted, allowed[: search.num_rows])
        for number, query in enumerate(queries):
            near = np.sort(candidates[number][candidates[number] >= 0])
            best = search_exactly(query[None], features, near, count)
            both = np.concatenate([similarity[number], best[0][0]])
            both_rows = np.concatenate([found[number], best[1][0]])
            order = np.lexsort((both_rows, -both))[:count]
            similarity[number], found[number] = both[order], both_rows[order]
        return similarity, found

    def _approximate(self) -> Approximate | None:
        made = self._store.manifest.approximate
        if self._loaded is not None and self._loaded[0] == made["file"]:
            return self._loaded[1]
        try:
            search = Approximate.load(self._store.folder / made["file"], made["kind"])
        except (ImportError, RuntimeError) as error:
            # faiss is not installed here, or another process has just replaced the file.
            logger.warning("The search is exact, which takes longer: %s", error)
            return None
        self._loaded = (made["file"], search)
        return search

"""``Index``: features of many images on the disk, to find a person in.

    index = Index.create("logs/index", embedder)
    index.add("crops", embedder)
    for result in search(index, ["query.jpg"], embedder=embedder):
        print(result.matches[0].path)

Shape shorthand in this module:

    N: rows of the index, removed ones included
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
# Rows that the approximate search lacks and an exact one looks at, until it is extended.
_MAX_TAIL = 10_000
# Candidates of the approximate search that are ranked again, per result.
_CANDIDATES_PER_RESULT = 4
_MIN_CANDIDATES = 64
_SAMPLED_QUERIES = 256  # of the threshold


class Index:
    """Features of many images, in a folder.

    Made by :meth:`create` or :meth:`open`. Adding and removing cost what is added or
    removed, not what is there; a process that is killed loses nothing that was there.

    Args:
        store: Its files.
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
        """Make an empty index for the features of one network.

        Args:
            folder: Folder to make, or an empty one.
            embedder: The network.
            source: Where it was read from, for searches that are not given a network.
            fp16: Whether to keep features in half precision: half the size, cosines off by
                at most some 1e-4.
            kind: ``"flat"``: exact. ``"hnsw"``, ``"ivf"``: approximate, by faiss; what they
                find is ranked exactly. ``"auto"``: flat up to 100,000 images, HNSW up to
                1,000,000, IVF above; flat without faiss.

        Returns:
            The index.

        Raises:
            ValueError: If the folder is not empty, or there is no such kind.
            ImportError: If the kind needs faiss.
        """  # noqa: DOC502  (raised by what this calls)
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
            folder: Its folder.

        Returns:
            The index.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged.
        """  # noqa: DOC502  (raised by what this calls)
        return cls(Store.open(folder))

    def __len__(self) -> int:
        return self._store.num_live

    @property
    def dim(self) -> int:
        """Length D of a feature."""
        return self._store.manifest.dim

    @property
    def paths(self) -> list[str]:
        """Files of all images, in the order of being added."""
        return [self._store.images[row].path for row in np.flatnonzero(self._store.live)]

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras, in order."""
        rows = np.flatnonzero(self._store.live)
        found = {self._store.images[row].camera for row in rows}
        return sorted(camera for camera in found if camera is not None)

    @property
    def kind(self) -> str:
        """How it is searched: ``"flat"``, ``"hnsw"`` or ``"ivf"``."""
        return str(self._store.manifest.approximate.get("kind", "flat"))

    @property
    def source(self) -> NetworkSource | None:
        """Where the network was read from; None if that was not said."""
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
        """Refuse a network that the index was not made with.

        It is recognized by its answers to four fixed patterns: an export of the network
        passes, the same weights at another input size do not.

        Args:
            embedder: The network.

        Raises:
            ValueError: If it is another one.
        """
        before = np.array(self._store.manifest.probe, dtype=np.float32)
        if not same_network(before, probe_answers(embedder)):
            made_with = self._store.manifest.network
            file = made_with.get("weights") or made_with.get("onnx") or "unknown"
            digest = made_with.get("sha256", "")[:12] or "unknown"
            raise ValueError(
                f"the index in {self._store.folder} was made with another network (file "
                f"{file}, SHA-256 {digest}...), whose features cannot be compared with "
                "those of this one: give that one, or make a new index"
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
        left as they are; so a call that was killed is repeated to go on.

        Args:
            folder: Searched to any depth.
            embedder: The network of the index.
            camera_pattern: Finds the camera in a path below the folder, as of
                ``selcon_plugin.datasets.read_image_folder``. Unlike in a training, one
                camera alone is kept as well.
            batch_size: Images computed together.
            max_unreadable_ratio: Fraction of the images that may be unreadable; they are
                left out.
            show_progress: Whether to draw a progress bar.

        Returns:
            How many were added.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it has no images, or the network is another one.
            BadImagesError: If too many images cannot be read; those read before stay.
        """  # noqa: DOC502  (raised by what this calls)
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
            self._keep_up()
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
        """Take out the images whose path fits a pattern; their files are left alone.

        Args:
            pattern: As in a shell, compared with the end of the path: ``"*.png"``,
                ``"cam3/*"``; an absolute one with the whole path.

        Returns:
            How many were taken out.

        Raises:
            ValueError: If the pattern fits none.
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
                    f"the pattern {pattern!r} fits none of the {len(self)} images of the "
                    f"index{hint}"
                )
            self._store.remove(rows)
            self._keep_up()
        return len(rows)

    def _keep_up(self) -> None:
        """Rewrite the files if most rows are removed ones; make or extend the search."""
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
            logger.info("making the search %s of %d images", kind, len(features))
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
        """Find the images nearest to features.

        Args:
            features: Unit vectors of the queries, shape ``(Q, D)``.
            top: Images per query.
            camera: Look only among these cameras; all if empty.
            not_camera: Do not look among these.
            threshold: Leave out what is less similar.
            leave_out: For each query a file that is not to be found, such as itself.

        Returns:
            For each query its matches, most similar first; of equal ones the one that was
            added first.

        Raises:
            ValueError: If the features are of another length or not finite, ``top`` is
                below 1, or no image has such a camera.
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
        # One more, for what is left out.
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
        """Suggest, without labels, from which cosine on two images are one person.

        Returns:
            See :func:`selcon_plugin.retrieval.suggest_threshold`; of 256 images, evenly
            spaced over the index, and their up to 1024 nearest neighbors.

        Raises:
            ValueError: If there are fewer than 3 images.
        """
        live = self._store.live
        rows = np.flatnonzero(live)
        if len(rows) < 3:
            raise ValueError(
                f"a threshold needs an index of 3 images or more, not {len(rows)}: give "
                "it as a number"
            )
        count = min(_SAMPLED_QUERIES, len(rows))
        sample = rows[np.arange(count) * len(rows) // count]
        queries = self._store.features()[sample].astype(np.float32)
        similarity, found = search_exactly(
            queries, self._store.features(), rows, min(LONGEST_LIST + 1, len(rows))
        )
        itself = found == sample[:, None]
        itself[~itself.any(axis=1), -1] = True  # among too many duplicates
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
                    f"no image of the index is of camera {name!r}; it has "
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
        """Find rows; similarity -inf and row -1 where there are fewer."""
        features, made = self._store.features(), self._store.manifest.approximate
        rows = np.flatnonzero(allowed)
        # Few of many rows are searched exactly: a graph would hardly reach them.
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
            logger.warning("searching exactly, which takes longer: %s", error)
            return None
        self._loaded = (made["file"], search)
        return search

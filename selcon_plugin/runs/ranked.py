"""Record of sample queries of the last evaluation with their top-ranked gallery images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.integrity import DamagedFileError, sealed_json, unsealed_json


@dataclass(frozen=True)
class LabeledImages:
    """Query or gallery images of a test set.

    Attributes:
        paths: Paths of the N image files.
        pids: Identity of each image, shape ``(N,)``.
        camids: Camera of each image, shape ``(N,)``.

    Raises:
        ValueError: If the three differ in length.
    """

    paths: Sequence[str]
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.paths) == len(self.pids) == len(self.camids):
            raise ValueError(
                f"paths, pids and camids must have the same length, got {len(self.paths)}, "
                f"{len(self.pids)} and {len(self.camids)}"
            )

    def __len__(self) -> int:
        return len(self.paths)


def rank_gallery(
    distance: ArrayLike, pid: int, camid: int, gallery: LabeledImages, *, top: int = 10
) -> NDArray[np.int64]:
    """Rank the gallery images for a query by Market-1501's protocol.

    Images of the query's identity from the query's camera are omitted: the protocol counts
    them neither as matches nor as mismatches.

    Args:
        distance: Distance of the query to every gallery image, shape ``(G,)``.
        pid: Identity of the query.
        camid: Camera of the query.
        gallery: Gallery images.
        top: Largest number of results, at least 1.

    Returns:
        Gallery indices, nearest first, shape ``(min(top, remaining images),)``.

    Raises:
        ValueError: If there is not one distance per gallery image, or ``top`` is below 1.

    Example:
        >>> pids, camids = np.array([1, 1, 2]), np.array([1, 2, 2])
        >>> gallery = LabeledImages(["a.jpg", "b.jpg", "c.jpg"], pids, camids)
        >>> rank_gallery([0.1, 0.3, 0.2], pid=1, camid=1, gallery=gallery).tolist()
        [2, 1]
    """
    distances = np.asarray(distance, dtype=np.float64)
    if distances.shape != (len(gallery),):
        raise ValueError(
            f"distance must have shape ({len(gallery)},), one value per gallery image, got "
            f"{distances.shape}"
        )
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    order = np.argsort(distances, kind="stable")
    junk = (gallery.pids[order] == pid) & (gallery.camids[order] == camid)
    ranked: NDArray[np.int64] = order[~junk][:top].astype(np.int64)
    return ranked


RANK_RECORD = "ranked.json"
_REMEDY = "The next evaluation during a training writes it again"

_QUERIES, _RESULTS = 12, 10


@dataclass(frozen=True)
class RankedImage:
    """Gallery image in the ranked list of a query.

    Attributes:
        path: Path of the image file.
        camid: Camera of the image.
        distance: Distance to the query.
        right: Whether it shows the query's identity.
    """

    path: str
    camid: int
    distance: float
    right: bool


@dataclass(frozen=True)
class RankedQuery:
    """Query with its nearest gallery images.

    Attributes:
        path: Path of the image file.
        pid: Identity of the query.
        camid: Camera of the query.
        average_precision: Average precision over the whole gallery by Market-1501's
            protocol; NaN if the gallery has no image of the identity from another camera.
        results: Nearest gallery images, nearest first.
        num_matches: Gallery images of the identity from other cameras; 0 if there are none,
            or in a record of an earlier version.
    """

    path: str
    pid: int
    camid: int
    average_precision: float
    results: tuple[RankedImage, ...]
    num_matches: int = 0


def rank_queries(
    distance: ArrayLike,
    query: Sequence[tuple[Any, ...]],
    gallery: Sequence[tuple[Any, ...]],
) -> list[RankedQuery]:
    """Rank the gallery for a few queries, evenly spaced over the list.

    Args:
        distance: Distances ``(Q, G)``.
        query: Path, identity and camera of each of the Q queries; further entries are
            ignored.
        gallery: Path, identity and camera of each of the G gallery images.

    Returns:
        At most 12 queries with at most 10 results each.
    """
    table = np.asarray(distance)
    images = LabeledImages(
        [item[0] for item in gallery],
        np.array([item[1] for item in gallery]),
        np.array([item[2] for item in gallery]),
    )
    # Evenly spaced, so that the selection is unbiased.
    count = min(_QUERIES, len(query))
    chosen = np.arange(count) * len(query) // max(1, count)
    return [_rank(table[number], query[number], images) for number in chosen.tolist()]


def _rank(distances: Any, item: tuple[Any, ...], gallery: LabeledImages) -> RankedQuery:
    path, pid, camid = item[:3]
    order = rank_gallery(distances, pid, camid, gallery, top=len(gallery))
    right = gallery.pids[order] == pid
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    average = float(precision[right].mean()) if right.any() else float("nan")
    results = tuple(
        RankedImage(
            gallery.paths[match],
            int(gallery.camids[match]),
            float(distances[match]),
            bool(gallery.pids[match] == pid),
        )
        for match in order[:_RESULTS]
    )
    matches = int(right.sum())
    return RankedQuery(str(path), int(pid), int(camid), average, results, matches)


def write_ranked(folder: str | Path, name: str, queries: Sequence[RankedQuery]) -> None:
    """Write the queries of a test set into a run's folder and keep other test sets.

    Args:
        folder: Existing folder of the run; nothing is written if it is empty.
        name: Name of the test set.
        queries: Queries of the test set.
    """
    if not folder:
        return
    try:
        known = read_ranked(folder)
    except ValueError:
        known = {}
    known[name] = list(queries)
    record = {key: [asdict(query) for query in value] for key, value in known.items()}
    write_atomically(sealed_json(record), Path(folder, RANK_RECORD))


def read_ranked(folder: str | Path) -> dict[str, list[RankedQuery]]:
    """Read the queries written by :func:`write_ranked`.

    Args:
        folder: Folder of a run.

    Returns:
        Queries by test set; empty if there is no file.

    Raises:
        DamagedFileError: If the file is damaged; the message names file and remedy.
    """
    file = Path(folder, RANK_RECORD)
    if not file.is_file():
        return {}
    record = unsealed_json(file.read_bytes(), file, remedy=_REMEDY)
    try:
        return {
            str(name): [_query(values) for values in queries]
            for name, queries in record.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DamagedFileError(f"{file} is damaged: {error}. {_REMEDY}") from error


def _query(values: dict[str, Any]) -> RankedQuery:
    results = tuple(
        RankedImage(str(r["path"]), int(r["camid"]), float(r["distance"]), bool(r["right"]))
        for r in values["results"]
    )
    return RankedQuery(
        str(values["path"]),
        int(values["pid"]),
        int(values["camid"]),
        float(values["average_precision"]),
        results,
        int(values.get("num_matches", 0)),
    )

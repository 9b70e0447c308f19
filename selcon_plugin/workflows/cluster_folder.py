"""``selcon cluster``, and ``cluster`` from Python: from images or features to clusters."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selcon_plugin.clustering import PseudoLabels, build_labeler
from selcon_plugin.clustering.base import clustering_device
from selcon_plugin.clustering.camera_centering import num_centered
from selcon_plugin.datasets import ImageItem, read_image_folder
from selcon_plugin.datasets.content import content_hashes, list_hash
from selcon_plugin.datasets.numbering import UNKNOWN, number_names
from selcon_plugin.datasets.reading import fault_of
from selcon_plugin.engine.estimates import (
    check_memory,
    clustering_estimate,
    extraction_estimate,
    product_rate,
)
from selcon_plugin.features import check_features
from selcon_plugin.inference.arguments import check_list
from selcon_plugin.inference.embedder import Embedder, choose_device
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.integrity import sealed_json, unsealed_json
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.io.streams import is_terminal
from selcon_plugin.report.sheets import SheetRow, contact_sheet
from selcon_plugin.retrieval import ImageEmbedder
from selcon_plugin.runs.folder import owned_run
from selcon_plugin.workflows.cluster_links import link_clusters
from selcon_plugin.workflows.folder_clusters import (
    FolderClusters,
    assess_clusters,
    chosen_labeler,
    cluster_features,
    default_options,
    summary,
)

__all__ = ["cluster", "cluster_folder", "fingerprint", "image_key"]

CSV_FILE, FEATURES_FILE, SHEET_FILE = "clusters.csv", "features.npz", "contact_sheet.jpg"
LINKS_FOLDER = "links"
# Records the network and the images from which the saved features were computed.
_SOURCE_FILE = "features.json"
# A larger sheet would exceed the maximum size of JPEG images.
_MOST_SHEET_ROWS = 400


def cluster_folder(
    load_embedder: Callable[[], Embedder],
    folder: str | Path,
    output: str | Path,
    *,
    network_key: str,
    labeler: str = "",
    options: Mapping[str, Any] | None = None,
    camera_pattern: str = "",
    links: bool = False,
    contact_sheet_rows: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    max_unreadable_ratio: float = 0.05,
    echo: Callable[[str], None] = lambda _: None,
) -> FolderClusters:
    """Cluster a folder of images by pseudo identity, and write the clusters.

    The function writes ``clusters.csv`` and ``features.npz`` to ``output``. A later call
    with the same network and images reuses these features. Estimates of time and memory
    are reported before the extraction and before the clustering.

    Args:
        load_embedder: Loads the network; called only if its features are not saved yet.
        folder: Folder of images, which is searched recursively.
        output: Folder to write to.
        network_key: Text that identifies the network.
        labeler: Registered name of the labeler; "" for Agglomerative, or for DBSCAN if one
            of its own options is given.
        options: Options of the labeler; by default each one that can be is "auto".
        camera_pattern: How to find the camera in a file's path, as for ``selcon train``.
        links: Whether to create a folder of links for each cluster.
        contact_sheet_rows: Number of the largest clusters to draw.
        batch_size: Images per batch of the feature extraction.
        num_workers: Number of processes that read images.
        device: Device of the clustering; ``"auto"`` for a GPU if there is one.
        max_unreadable_ratio: Fraction of the images that may be unreadable; they belong to
            no cluster and are left out.
        echo: Receives lines for the user.

    Returns:
        The clusters.

    Raises:
        ValueError: If an option is illegal, the memory does not suffice, or the output
            cannot be written.
        FileNotFoundError: If the folder does not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    if not 0 <= contact_sheet_rows <= _MOST_SHEET_ROWS:
        raise ValueError(
            f"--contact-sheet draws 1 to {_MOST_SHEET_ROWS} clusters, got "
            f"{contact_sheet_rows}"
        )
    check_output_folder("--output", str(output))
    output = Path(output)
    items = read_image_folder(folder, camera_pattern=camera_pattern)
    labeler = chosen_labeler(labeler, options)
    # Options are checked before the long work.
    _options(labeler, len(items), options)
    with owned_run(output):
        source = {"network": network_key, "content": image_key(items)}
        found = _kept_features(output, source, echo)
        if found is None:
            found = _compute_features(
                load_embedder(),
                items,
                batch_size,
                num_workers,
                echo,
                max_unreadable_ratio=max_unreadable_ratio,
                show_progress=is_terminal(sys.stderr),
            )
            # The source is written last: a kill leaves features that are not used.
            (output / _SOURCE_FILE).unlink(missing_ok=True)
            found.save(output / FEATURES_FILE)
            write_atomically(sealed_json(source), output / _SOURCE_FILE)
        else:
            echo(f"{len(found.paths):,} features of this network are reused from {output}")
            found = _with_cameras(found, items, output)
        camera_of = {item.path: item.camera for item in items}
        clusters = cluster(
            found,
            cameras=[camera_of.get(path) for path in found.paths],
            labeler=labeler,
            device=device,
            echo=echo,
            **(options or {}),
        )
        clusters = dataclasses.replace(clusters, folder=str(folder))
        clusters.to_csv(output / CSV_FILE)
        echo(f"{summary(clusters, labeler)}: {output / CSV_FILE}")
        if links:
            link_clusters(clusters, output / LINKS_FOLDER)
            echo(f"Links by cluster: {output / LINKS_FOLDER}")
        if contact_sheet_rows and clusters.num_clusters:
            _draw_sheet(clusters, output / SHEET_FILE, contact_sheet_rows, echo)
        return clusters


def cluster(
    images: Any,
    embedder: ImageEmbedder | None = None,
    *,
    cameras: Sequence[Any] | None = None,
    camera_pattern: str = "",
    labeler: str = "",
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
    max_unreadable_ratio: float = 0.05,
    show_progress: bool = False,
    echo: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> FolderClusters:
    """Cluster images by pseudo identity, as ``selcon cluster`` does; nothing is written.

    Args:
        images: Folder of images, which is searched recursively; a list of images, as for
            :class:`~selcon_plugin.inference.embedder.Embedder`; or their features:
            :class:`~selcon_plugin.inference.folder_features.FolderFeatures`, or unit
            vectors ``(M, C)`` as an array or tensor.
        embedder: Network that computes the features of images; None for features. A folder
            needs an ``Embedder``.
        cameras: Camera of each image of a list, or of each feature: names or numbers; None,
            "" or -1 where unknown. None for those of ``FolderFeatures``, or for no cameras.
        camera_pattern: For a folder, how to find the camera in a file's path; see
            :func:`selcon_plugin.datasets.read_image_folder`.
        labeler: Registered name of the labeler; "" for Agglomerative, or for DBSCAN if one
            of its own options is given.
        device: Device of the clustering; ``"auto"`` for a GPU if there is one.
        batch_size: Images per batch of the feature extraction.
        num_workers: Number of processes that read the images of a folder.
        max_unreadable_ratio: Fraction of a folder's images that may be unreadable; they are
            left out with a warning.
        show_progress: Whether to show a progress bar for the features of a folder.
        echo: Receives lines for the user, such as ``print``.
        **options: Options of the labeler by name, such as ``threshold=0.7`` or
            ``images_per_person=4``; by default each one that can be is "auto".

    Returns:
        The clusters, the largest numbered 0.

    Raises:
        ValueError: If an argument or option is wrong, or the memory does not suffice.
        BadImagesError: If more images of a folder are unreadable.
        BadFeaturesError: If the features are not unit vectors, one per image.
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> features = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 1, 2]]
        >>> found = cluster(features, threshold=0.5, k1=3, k2=1)
        >>> found.labels.tolist(), found.representatives.tolist()
        ([0, 0, 0, 1, 1, 1, -1], [0, 3])
    """  # noqa: DOC502  (raised by the functions called here)
    labeler = chosen_labeler(labeler, options)
    place = str(clustering_device(choose_device(device)))
    is_folder = isinstance(images, (str, os.PathLike))
    if is_folder:
        if cameras is not None:
            raise ValueError("cameras belong to a list: give camera_pattern for a folder")
        if not isinstance(embedder, Embedder):
            raise ValueError(
                f"embedder must be an Embedder for the folder {os.fspath(images)!r}, got "
                f"{embedder!r}: Embedder.from_checkpoint loads one"
            )
        items = read_image_folder(images, camera_pattern=camera_pattern)
        _options(labeler, len(items), options)
        found = _compute_features(
            embedder,
            items,
            batch_size,
            num_workers,
            echo,
            max_unreadable_ratio=max_unreadable_ratio,
            show_progress=show_progress,
        )
        camera_of = {item.path: item.camera for item in items}
        cameras = [camera_of[path] for path in found.paths]
    else:
        found = _features_of(images, embedder, batch_size)
        if not found.paths:
            raise ValueError("images are empty: there is nothing to cluster")
    if cameras is None:
        names = ["" if camera < 0 else str(camera) for camera in found.camids.tolist()]
    else:
        found, names = _seen_by(found, cameras)
    values = _options(labeler, len(found.paths), options, warn=True)
    labels = _cluster(found, labeler, values, place, echo)
    numbers = labels.labels.numpy()
    is_multi_scale = labeler == "Agglomerative" and values["k1"] == "auto"
    confidence, cohesion = assess_clusters(
        found.features,
        found.camids,
        numbers,
        distance=labels.distance if is_multi_scale else None,
        device=place,
    )
    return FolderClusters(
        found.paths,
        names,
        numbers,
        confidence,
        folder=os.fspath(images) if is_folder else "",
        measured=labels.measured,
        cohesion=cohesion,
    )


def _options(
    labeler: str,
    num_images: int,
    options: Mapping[str, Any] | None,
    *,
    warn: bool = False,
) -> dict[str, Any]:
    """Return checked options of a labeler, with those that it chooses for itself."""
    values = {**default_options(labeler), **(options or {})}
    build_labeler(labeler, **values).check_counts(num_images, warn=warn)
    return values


def _features_of(
    images: Any, embedder: ImageEmbedder | None, batch_size: int
) -> FolderFeatures:
    """Return the features of a list of images, or those that are given."""
    is_features = isinstance(images, FolderFeatures) or getattr(images, "ndim", 0) == 2
    if is_features and embedder is not None:
        raise ValueError("images are features already: leave embedder out")
    if isinstance(images, FolderFeatures):
        return images
    if is_features:
        features = check_features(images, source="the features to cluster")
        paths = [str(row) for row in range(len(features))]
    else:
        listed = check_list("images", images, one="image")
        if embedder is None:
            raise ValueError(
                "embedder is None: pass one for images, or features of shape (M, C)"
            )
        features = check_features(
            embedder(listed, batch_size=batch_size),
            source="the embedder's output",
            rows=len(listed),
        )
        paths = [
            os.fspath(image) if isinstance(image, (str, os.PathLike)) else str(row)
            for row, image in enumerate(listed)
        ]
    return FolderFeatures(tuple(paths), np.full(len(paths), UNKNOWN), features)


def _seen_by(
    found: FolderFeatures, cameras: Sequence[Any]
) -> tuple[FolderFeatures, list[str]]:
    """Replace the cameras of features; also return their names, "" where unknown."""
    listed = [
        None if c in (None, "", UNKNOWN) else c for c in check_list("cameras", cameras)
    ]
    if len(listed) != len(found.paths):
        raise ValueError(
            f"cameras must hold one value for each of {len(found.paths)} images, got "
            f"{len(listed)}"
        )
    camids = np.array(number_names(listed), dtype=np.int64)
    names = ["" if camera is None else str(camera) for camera in listed]
    return dataclasses.replace(found, camids=camids), names


def _draw_sheet(
    clusters: FolderClusters, file: Path, most: int, echo: Callable[[str], None]
) -> None:
    numbers = range(min(most, clusters.num_clusters))
    rows = [_sheet_row(clusters, number) for number in numbers]
    echo(f"Contact sheet: {contact_sheet(file, rows)}")


def image_key(items: Sequence[ImageItem]) -> str:
    """Return a short hash of the images' names and contents.

    Args:
        items: The images.

    Returns:
        Sixteen hexadecimal digits.
    """
    hashes = content_hashes([item.path for item in items])
    names = [os.path.abspath(item.path) for item in items]
    return list_hash([f"{a} {b}" for a, b in zip(names, hashes, strict=True)])


def fingerprint(items: Sequence[ImageItem]) -> str:
    """Return a short hash of the images' names, sizes and modification times.

    Args:
        items: The images.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256()
    for item in items:
        state = ""
        with contextlib.suppress(OSError):
            status = os.stat(item.path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{os.path.abspath(item.path)}\0{state}\n".encode(errors="replace"))
    return digest.hexdigest()[:16]


def _kept_features(
    output: Path, source: Mapping[str, str], echo: Callable[[str], None]
) -> FolderFeatures | None:
    """Return the saved features if they belong to this network and these images."""
    file = output / _SOURCE_FILE
    try:
        same = unsealed_json(file.read_bytes(), file) == source
        return FolderFeatures.load(output / FEATURES_FILE) if same else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        echo(f"The saved features are computed again: {error}")
        return None


def _with_cameras(
    found: FolderFeatures, items: Sequence[ImageItem], output: Path
) -> FolderFeatures:
    """Update the camera numbers of features that were saved with another pattern."""
    camera_of = {item.path: item.camera for item in items}
    numbers = number_names([camera_of.get(path) for path in found.paths])
    camids = np.array(numbers, dtype=np.int64)
    if np.array_equal(camids, found.camids):
        return found
    found = dataclasses.replace(found, camids=camids)
    found.save(output / FEATURES_FILE)
    return found


def _compute_features(
    embedder: Embedder,
    items: Sequence[ImageItem],
    batch_size: int,
    num_workers: int,
    echo: Callable[[str], None],
    *,
    max_unreadable_ratio: float,
    show_progress: bool,
) -> FolderFeatures:
    # An unreadable image would fail the measurement, so the next readable one replaces it.
    readable = (item.path for item in items if not fault_of(item.path))
    first = list(itertools.islice(readable, batch_size))
    if first:
        expected = extraction_estimate(
            lambda count: embedder(first[:count], batch_size=batch_size),
            len(items),
            embedder.dim,
            batch_size=len(first),
        )
        echo(f"{len(items):,} images: computing their features takes {expected}")
        check_memory(expected, f"computing the features of {len(items):,} images")
    return embedder.embed_items(
        items,
        batch_size=batch_size,
        num_workers=num_workers,
        max_unreadable_ratio=max_unreadable_ratio,
        show_progress=show_progress,
    )


def _cluster(
    found: FolderFeatures,
    labeler: str,
    options: Mapping[str, Any],
    device: str,
    echo: Callable[[str], None],
) -> PseudoLabels:
    num_images, dim = found.features.shape
    neighbors = build_labeler(labeler, **options).num_neighbors(num_images)
    expected = clustering_estimate(
        num_images, dim, k1=neighbors, products_per_second=product_rate(dim, device)
    )
    chosen = ", ".join(f"{name} {value}" for name, value in options.items())
    echo(f"Clustering takes {expected}: {labeler} ({chosen or 'default options'})")
    if device == "cpu":
        check_memory(expected, f"clustering {num_images:,} images")
    started = time.perf_counter()
    if centered := num_centered(torch.from_numpy(found.camids)):
        echo(f"Per-camera feature centering: {centered} cameras")
    labels = cluster_features(
        found.features, found.camids, labeler=labeler, options=options, device=device
    )
    echo(f"Clustered in {time.perf_counter() - started:.1f} s")
    return labels


def _sheet_row(clusters: FolderClusters, number: int) -> SheetRow:
    members = clusters.members(number)
    cameras = {clusters.cameras[image] for image in members} - {""}
    seen = f", {len(cameras)} camera{'s' * (len(cameras) > 1)}" if cameras else ""
    confidence = float(clusters.confidence[members].mean())
    cohesion = "" if clusters.cohesion is None else f"{clusters.cohesion[number]:.2f}"
    return SheetRow(
        f"cluster {number}: {len(members)} images{seen}, mean confidence {confidence:.2f}"
        + (cohesion and f", cohesion {cohesion}"),
        [clusters.paths[image] for image in members],
    )

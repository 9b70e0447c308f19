r"""Data sets of the plugin in torchreid: any folder of images, and synthetic persons.

Registered names are lower case like torchreid's own (``market1501``): ``imagefolderreid``
and ``syntheticpersons``. ``ImageDataManager`` passes the same arguments to every data set;
the options of our data sets are bound to a name of the caller's choice::

    register_image_folder("station", "crops/station", camera_pattern=r"cam(\d+)")
    register_synthetic_persons("few", SyntheticPersonsSpec(num_train_ids=20))
    ImageDataManager(root="datasets", sources=["station", "few"], targets="few")
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.datasets import (
    SyntheticPersonsSpec,
    generate_synthetic_persons,
    read_image_folder,
    read_market_splits,
)
from selcon_plugin.datasets.numbering import NamedNumber, number_names

logger = logging.getLogger(__name__)

IMAGE_FOLDER, SYNTHETIC_PERSONS = OWN_DATASETS = ("imagefolderreid", "syntheticpersons")

_torchreid: Any = import_torchreid()
_ImageDataset: Any = _torchreid.data.ImageDataset


class _Unknown(int):
    """Number that stays the same when torchreid combines sources.

    torchreid distinguishes the persons and cameras of several sources by adding offsets. If
    an offset is added to a plain -1, the result is the number of a known person.
    """

    def __add__(self, other: int) -> _Unknown:
        return self


UNKNOWN_PID = _Unknown(-1)
UNKNOWN_CAMERA = _Unknown(-1)


class _NoImages(list[Any]):
    """Empty list with an empty first entry, whose length torchreid reads."""

    def __getitem__(self, index: Any) -> Any:
        return ()


class ImageFolderReID(_ImageDataset):
    """Training set of any folder of images, without identities and without a test set.

    Cameras are numbered 0, 1, ... by name. Every identity and each unknown camera is -1,
    even if sources are combined. torchreid counts -1 as one identity and as one camera.

    Query and gallery are empty: use another data set in ``targets``, or pass
    ``targets=[]``.

    Args:
        root: Root of the data sets; the folder itself if ``folder`` is not given.
        folder: Folder of images.
        camera_pattern: Pattern that finds the camera in a path; see
            :func:`selcon_plugin.datasets.read_image_folder`.
        mode: ``"train"``, ``"query"`` or ``"gallery"``. The folder is read only for
            training.
        verbose: Whether to print a summary.
        **kwargs: Arguments of torchreid's base class.

    Raises:
        ValueError: If neither ``folder`` nor ``root`` is given.
    """

    def __init__(
        self,
        root: str = "",
        folder: str = "",
        camera_pattern: str = "",
        mode: str = "train",
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        folder = folder or root
        if not folder:
            raise ValueError(
                "folder='' and root='': an image folder is required. Pass root=FOLDER to "
                "ImageDataManager, or call register_image_folder(NAME, FOLDER)"
            )
        reads = mode == "train"
        if mode == "query":
            logger.warning(
                "%s has no test set: set targets to one, or pass targets=[]", folder
            )
        super().__init__(
            _unlabeled_images(folder, camera_pattern) if reads else _NoImages(),
            _NoImages(),
            _NoImages(),
            mode=mode,
            verbose=verbose and reads,
            **kwargs,
        )


class SyntheticPersons(_ImageDataset):
    """Synthetic persons in several cameras, rendered below the root if they are absent.

    Args:
        root: Root of the data sets.
        spec: Size and seed.
        **kwargs: Arguments of torchreid's base class.
    """

    _junk_pids = [-1]  # noqa: RUF012  (torchreid's convention)

    def __init__(
        self,
        root: str = "",
        spec: SyntheticPersonsSpec | None = None,
        **kwargs: Any,
    ) -> None:
        root = os.path.abspath(os.path.expanduser(root))  # as in torchreid's data sets
        folder = generate_synthetic_persons(
            root, spec or SyntheticPersonsSpec(), progress=True
        )
        splits = read_market_splits(folder)
        pids = sorted({pid for _, pid, _ in splits.train})
        label = {pid: i for i, pid in enumerate(pids)}
        train = [(path, label[pid], camid) for path, pid, camid in splits.train]
        super().__init__(train, splits.query, splits.gallery, **kwargs)


def register_datasets() -> None:
    """Register ``imagefolderreid`` and ``syntheticpersons``; a second call has no effect.

    ``imagefolderreid`` reads the folder given as ``root``; ``syntheticpersons`` has the
    default size and seed of :class:`selcon_plugin.datasets.SyntheticPersonsSpec`.
    """
    register_image_folder(IMAGE_FOLDER)
    register_synthetic_persons(SYNTHETIC_PERSONS)


def register_image_folder(
    name: str, folder: str | Path = "", camera_pattern: str = ""
) -> None:
    """Register a folder of images as a torchreid data set.

    Args:
        name: Name for ``sources``. A second call with the same options has no effect.
        folder: Folder of images; ``""`` for the data manager's ``root``.
        camera_pattern: See :func:`selcon_plugin.datasets.read_image_folder`.
    """
    folder = os.fspath(folder)
    _register(name, ImageFolderReID, folder=folder, camera_pattern=camera_pattern)


def register_synthetic_persons(name: str, spec: SyntheticPersonsSpec | None = None) -> None:
    """Register synthetic persons with a size and a seed as a torchreid data set.

    Args:
        name: Name for ``sources`` and ``targets``. A second call with the same
            specification has no effect.
        spec: Size and seed.
    """
    _register(name, SyntheticPersons, spec=spec or SyntheticPersonsSpec())


def image_dataset_names() -> list[str]:
    """Return the names of all image data sets registered with torchreid."""
    return list(image_datasets())


def image_datasets() -> dict[str, Any]:
    """Return the classes of all image data sets registered with torchreid, by name."""
    known: dict[str, Any] = vars(_torchreid.data.datasets)["__image_datasets"]
    return known


def plain_name(name: str) -> str:
    """Return the name in a config of a data set that is bound to its options.

    Args:
        name: Name that :mod:`selcon_plugin.torchreid_ext.train` has registered, or another.
    """
    plain = name.rpartition("-")[0]
    return plain if plain in OWN_DATASETS else name


def _register(name: str, dataset: type, **options: Any) -> None:
    """Register a data set with its options bound."""
    bound = functools.partial(dataset, **options)
    known = vars(_torchreid.data.datasets)["__image_datasets"].get(name)
    if known is None:
        _torchreid.data.register_image_dataset(name, bound)
    elif not (
        isinstance(known, functools.partial)
        and (known.func, known.keywords) == (bound.func, bound.keywords)
    ):
        raise ValueError(
            f"name={name!r} is taken by another data set, or by this one with other "
            "options: choose another name"
        )


def _unlabeled_images(folder: str, camera_pattern: str) -> list[tuple[str, int, int]]:
    """List a folder as ``(path, pid, camid)``."""
    items = read_image_folder(folder, camera_pattern=camera_pattern)
    camids = number_names([item.camera for item in items])
    return [
        (
            item.path,
            UNKNOWN_PID,
            UNKNOWN_CAMERA if item.camera is None else NamedNumber(camid, item.camera),
        )
        for item, camid in zip(items, camids, strict=True)
    ]

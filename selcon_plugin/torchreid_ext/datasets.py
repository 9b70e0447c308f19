r"""Data sets registered with torchreid: any folder of images, and the embedded default.

Registered names are lower case, as torchreid's own (``market1501``): ``imagefolderreid``
and ``syntheticpersons``. ``ImageDataManager`` hands every data set the same arguments: what
is particular to ours is bound to a name of the caller's choice::

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
from selcon_plugin.datasets.numbering import UNKNOWN, number_names

logger = logging.getLogger(__name__)

_torchreid: Any = import_torchreid()
_ImageDataset: Any = _torchreid.data.ImageDataset


class _Unknown(int):
    """A number that stays what it is when torchreid combines sources.

    torchreid tells the people and the cameras of several sources apart by adding offsets.
    Added to a plain -1, an offset gives the number of somebody known.
    """

    def __add__(self, other: int) -> _Unknown:
        return self


UNKNOWN_PID = _Unknown(-1)
UNKNOWN_CAMERA = _Unknown(-1)


class _NoImages(list[Any]):
    """An empty list. torchreid asks every list how long its first entry is."""

    def __getitem__(self, index: Any) -> Any:
        return ()


class ImageFolderReID(_ImageDataset):
    """Any folder of images as a training set without identities; it has no test set.

    Cameras are numbered 0, 1, ... by name. Every identity and each unknown camera is -1,
    also among combined sources. torchreid counts -1 as one identity and as one camera.

    Query and gallery are empty: name another data set in ``targets``, or pass
    ``targets=[]``.

    Args:
        root: Root of the data sets; the folder itself where ``folder`` is not given.
        folder: The folder.
        camera_pattern: How to find a file's camera; see
            :func:`selcon_plugin.datasets.read_image_folder`.
        mode: ``"train"``, ``"query"`` or ``"gallery"``. The folder is read for training
            only.
        verbose: Whether to print a summary.
        **kwargs: torchreid's own.

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
                "folder='' and root='': an image folder has to be named. Pass root=FOLDER "
                "to ImageDataManager, or call register_image_folder(NAME, FOLDER)"
            )
        reads = mode == "train"
        if mode == "query":
            logger.warning(
                "%s has no test set: name one in targets, or pass targets=[]", folder
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
    """Drawn people seen by several cameras; draws itself under the root when absent.

    Args:
        root: Root of the data sets.
        spec: Size and seed.
        **kwargs: torchreid's own.
    """

    _junk_pids = [-1]  # noqa: RUF012  (torchreid's convention)

    def __init__(
        self,
        root: str = "",
        spec: SyntheticPersonsSpec | None = None,
        **kwargs: Any,
    ) -> None:
        root = os.path.abspath(os.path.expanduser(root))  # as torchreid's own do
        folder = generate_synthetic_persons(
            root, spec or SyntheticPersonsSpec(), progress=True
        )
        splits = read_market_splits(folder)
        pids = sorted({pid for _, pid, _ in splits.train})
        label = {pid: i for i, pid in enumerate(pids)}
        train = [(path, label[pid], camid) for path, pid, camid in splits.train]
        super().__init__(train, splits.query, splits.gallery, **kwargs)


def register_datasets() -> None:
    """Register ``imagefolderreid`` and ``syntheticpersons``; again changes nothing.

    ``imagefolderreid`` reads the folder given as ``root``; ``syntheticpersons`` has the
    size and seed that :class:`selcon_plugin.datasets.SyntheticPersonsSpec` has by default.
    """
    register_image_folder("imagefolderreid")
    register_synthetic_persons("syntheticpersons")


def register_image_folder(
    name: str, folder: str | Path = "", camera_pattern: str = ""
) -> None:
    """Register a folder of images as a torchreid data set.

    Args:
        name: Name for ``sources``. The same name with the same options changes nothing.
        folder: The folder; ``""`` is the data manager's ``root``.
        camera_pattern: See :func:`selcon_plugin.datasets.read_image_folder`.
    """
    folder = os.fspath(folder)
    _register(name, ImageFolderReID, folder=folder, camera_pattern=camera_pattern)


def register_synthetic_persons(name: str, spec: SyntheticPersonsSpec | None = None) -> None:
    """Register drawn people of some size and seed as a torchreid data set.

    Args:
        name: Name for ``sources`` and ``targets``. The same name with the same
            specification changes nothing.
        spec: Size and seed.
    """
    _register(name, SyntheticPersons, spec=spec or SyntheticPersonsSpec())


def image_dataset_names() -> list[str]:
    """Return the names of all image data sets registered with torchreid."""
    return list(vars(_torchreid.data.datasets)["__image_datasets"])


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
        (item.path, UNKNOWN_PID, UNKNOWN_CAMERA if camid == UNKNOWN else camid)
        for item, camid in zip(items, camids, strict=True)
    ]

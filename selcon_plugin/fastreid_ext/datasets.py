"""Data sets of the plugin in FastReID: any folder of images, and synthetic persons."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from fastreid.config import CfgNode, get_cfg
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.data.datasets.bases import ImageDataset

from selcon_plugin.datasets import (
    SyntheticPersonsSpec,
    generate_synthetic_persons,
    read_image_folder,
    read_market_splits,
)
from selcon_plugin.datasets.list_files import DatasetReading

UNKNOWN_PID = -1
UNKNOWN_CAMERA = -1
_DEFAULT_DATASETS = get_cfg().DATASETS.NAMES


def dataset_root() -> str:
    """Return the folder in which FastReID looks for data sets."""
    return os.getenv("FASTREID_DATASETS", "datasets")


def synthetic_persons_spec(cfg: CfgNode) -> SyntheticPersonsSpec:
    """Return the size and seed of ``SyntheticPersons`` in the config."""
    node = cfg.DATASETS.SYNTHETIC_PERSONS
    return SyntheticPersonsSpec(**{key.lower(): value for key, value in node.items()})


def build_dataset(
    cfg: CfgNode, name: str, *, splits: Sequence[str] = (), **kwargs: Any
) -> ImageDataset:
    """Build a data set by its registered name.

    Args:
        cfg: Config with the plugin's keys, for the options of our own data sets.
        name: Registered name.
        splits: Splits to list now: ``"train"``, ``"query"``, ``"gallery"``. Some data sets
            list them only when they are read.
        **kwargs: Further constructor arguments, such as ``combineall``.

    Returns:
        FastReID's data set.

    Raises:
        FileNotFoundError: If the data set is not below the data set root.
        ValueError: If the name of a file, or a line of a list, is wrong.
    """  # noqa: DOC502  (raised by DatasetReading)
    cls, root = DATASET_REGISTRY.get(name), dataset_root()
    if issubclass(cls, ImageFolderReID):
        folder = cfg.DATASETS.IMAGE_FOLDER
        kwargs.update(image_folder=folder.ROOT, camera_pattern=folder.CAMERA_PATTERN)
    elif issubclass(cls, SyntheticPersons):
        kwargs["spec"] = synthetic_persons_spec(cfg)
    if issubclass(cls, (ImageFolderReID, SyntheticPersons)):
        return cls(root=root, **kwargs)  # they have their own messages
    remedy = (
        "Put it there, or set the environment variable FASTREID_DATASETS to the folder "
        "that contains the data sets"
    )
    if name in _DEFAULT_DATASETS:
        remedy += (
            f", or name another data set: {name} is FastReID's default of both "
            "DATASETS.NAMES and DATASETS.TESTS, and DATASETS.TESTS may be ()"
        )
    place = f"DATASETS, in {os.path.abspath(root)}"
    reading = DatasetReading(name, place, remedy, [cls])
    with warnings.catch_warnings(), reading:
        # Some data sets warn of an old structure where the folder does not exist.
        warnings.filterwarnings("ignore", "The current data structure is deprecated")
        data = cls(root=root, **kwargs)
        for split in splits:
            items = getattr(data, split)
            reading.check_images(split, [path for path, *_ in items])
    return data


@DATASET_REGISTRY.register()
class ImageFolderReID(ImageDataset):
    """Training set of any folder of images, without identities and without a test set.

    Args:
        root: FastReID's data set root, which is not used.
        image_folder: Folder of images (``DATASETS.IMAGE_FOLDER.ROOT``).
        camera_pattern: Pattern that finds the camera in a path; see
            :func:`selcon_plugin.datasets.read_image_folder`.
        **kwargs: Arguments of FastReID's base class.
    """

    dataset_name = "imagefolder"

    def __init__(
        self,
        root: str = "",
        image_folder: str = "",
        camera_pattern: str = "",
        **kwargs: Any,
    ) -> None:
        if not image_folder:
            raise ValueError(
                "the data set ImageFolderReID needs a folder: set "
                "DATASETS.IMAGE_FOLDER.ROOT, or run selcon train --images FOLDER"
            )
        items = read_image_folder(image_folder, camera_pattern=camera_pattern)
        train = [
            (item.path, UNKNOWN_PID, UNKNOWN_CAMERA if item.camera is None else item.camera)
            for item in items
        ]
        super().__init__(train, [], [], **kwargs)


@DATASET_REGISTRY.register()
class SyntheticPersons(ImageDataset):
    """Synthetic persons in several cameras, rendered below the root if they are absent.

    Args:
        root: FastReID's data set root.
        spec: Size and seed (``DATASETS.SYNTHETIC_PERSONS``).
        **kwargs: Arguments of FastReID's base class.
    """

    dataset_name = "synthetic"
    _junk_pids = [-1]  # noqa: RUF012  (FastReID's convention)

    def __init__(
        self,
        root: str = "datasets",
        spec: SyntheticPersonsSpec | None = None,
        **kwargs: Any,
    ) -> None:
        folder = generate_synthetic_persons(
            root, spec or SyntheticPersonsSpec(), progress=True
        )
        splits = read_market_splits(folder)
        train = [
            (path, f"{self.dataset_name}_{pid}", f"{self.dataset_name}_{camid}")
            for path, pid, camid in splits.train
        ]
        super().__init__(train, splits.query, splits.gallery, **kwargs)

"""How ``selcon bench`` speaks to each host: keys of its config, words of its log."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selcon_plugin.hosts import host_of, load_config

# The hosts are imported inside the functions: FastReID reads FASTREID_DATASETS when it is.


@dataclass(frozen=True)
class BenchHost:
    """Where a host's config and log say what the bench needs.

    Attributes:
        name: Package of the host.
        output_key: Folder of a run.
        seed_key: Its seed.
        epochs_key: Its epochs.
        checkpoints: What there is in the folder of a run that has begun.
        log: File that tells how far a run is; empty for what it prints.
        progress: Finds epoch and time left in it.
        first_epoch: Number of the first epoch there.
    """

    name: str
    output_key: str
    seed_key: str
    epochs_key: str
    checkpoints: str
    log: str
    progress: re.Pattern[str]
    first_epoch: int

    def option_pairs(self, options: Sequence[str]) -> list[str]:
        """Pick the ``KEY VALUE`` pairs that are this host's: torchreid's are lower case."""
        pairs = zip(options[::2], options[1::2], strict=False)
        lower = self.name == "torchreid"
        return [
            word for key, value in pairs if key.islower() == lower for word in (key, value)
        ]

    def dataset_options(self, name: str) -> list[str]:
        """Return the options that train and test on one data set."""
        if self.name == "torchreid":
            value = repr([name.lower()])
            return ["data.sources", value, "data.targets", value]
        value = repr((name,))
        return ["DATASETS.NAMES", value, "DATASETS.TESTS", value]

    def set_run(self, cfg: Any, folder: str, seed: int) -> None:
        """Set a run's folder and seed in its config, in place."""
        for key, value in ((self.output_key, folder), (self.seed_key, seed)):
            *path, last = key.split(".")
            node = cfg
            for part in path:
                node = node[part]
            node[last] = value

    def comparable(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Name settings as FastReID does, where it has the same.

        Args:
            settings: Effective values by full key.

        Returns:
            The same with other keys.
        """
        if self.name != "torchreid":
            return dict(settings)
        result = {_fastreid_key(key): value for key, value in settings.items()}
        size = [settings["data.height"], settings["data.width"]]
        result["INPUT.SIZE_TRAIN"] = result["INPUT.SIZE_TEST"] = size
        return result


_KEYS = {
    "data.save_dir": "OUTPUT_DIR",
    "model.name": "MODEL.BACKBONE.NAME",
    "train.max_epoch": "SOLVER.MAX_EPOCH",
    "train.batch_size": "SOLVER.IMS_PER_BATCH",
    "train.lr": "SOLVER.BASE_LR",
    "train.weight_decay": "SOLVER.WEIGHT_DECAY",
    "sampler.num_instances": "DATALOADER.NUM_INSTANCE",
}
_NODES = {"selcon.": "MODEL.SELCON.", "synthetic_persons.": "DATASETS.SYNTHETIC_PERSONS."}


def _fastreid_key(key: str) -> str:
    for node, name in _NODES.items():
        if key.startswith(node):
            return name + key.removeprefix(node).upper()
    return _KEYS.get(key, key)


_TIME = r"(?:(?P<days>\d+) days?, )?(?P<time>\d+:\d+:\d+)"

HOSTS = {
    host.name: host
    for host in (
        BenchHost(
            "fastreid",
            output_key="OUTPUT_DIR",
            seed_key="MODEL.SELCON.SEED",
            epochs_key="SOLVER.MAX_EPOCH",
            checkpoints="last_checkpoint",
            log="log.txt",
            progress=re.compile(rf"(?:eta: {_TIME}  )?epoch/iter: (?P<epoch>\d+)/"),
            first_epoch=0,
        ),
        BenchHost(
            "torchreid",
            output_key="data.save_dir",
            seed_key="selcon.seed",
            epochs_key="train.max_epoch",
            checkpoints="model",
            log="",
            progress=re.compile(rf"epoch: \[(?P<epoch>\d+)/[^\n]*?\beta {_TIME}"),
            first_epoch=1,
        ),
    )
}


def load_bench_config(file: str, options: Sequence[str]) -> Any:
    """Read a config, and refuse what could not be trained before anything else is.

    Args:
        file: Config of either host.
        options: ``KEY VALUE`` pairs of this host.

    Returns:
        The config, not frozen.

    Raises:
        ValueError: If it would train on identities or names an unknown data set.
    """
    host = HOSTS[host_of(file)]
    with warnings.catch_warnings():
        # On their first import the hosts say that their ranking is not compiled.
        warnings.filterwarnings("ignore", message="Cython .*evaluation")
        cfg = load_config(file, options, host=host.name)
        try:
            names, known = (_of_torchreid if host.name == "torchreid" else _of_fastreid)(
                cfg
            )
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    for name in names:
        if name not in known:
            raise ValueError(
                f"{file}: unknown data set {name!r}; known are {', '.join(sorted(known))}"
            )
    cfg.defrost()
    return cfg


def _of_fastreid(cfg: Any) -> tuple[Sequence[str], Sequence[str]]:
    """Return the data sets that a config names, and those there are."""
    from fastreid.data.datasets import DATASET_REGISTRY

    from selcon_plugin.fastreid_ext import SelConTrainer

    SelConTrainer.check_meta_architecture(cfg)
    return (*cfg.DATASETS.NAMES, *cfg.DATASETS.TESTS), list(DATASET_REGISTRY._obj_map)


def _of_torchreid(cfg: Any) -> tuple[Sequence[str], Sequence[str]]:
    from selcon_plugin.torchreid_ext.datasets import image_dataset_names

    return (*cfg.data.sources, *cfg.data.targets), image_dataset_names()

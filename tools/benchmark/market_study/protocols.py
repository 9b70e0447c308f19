"""Protocols of the study: configs, common options, and the changes tried on each config.

A change is a dict of config keys and values. Settings that exclude each other form a group;
a group's levels are tried one at a time on a config.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Options = dict[str, Any]
Groups = Mapping[str, Mapping[str, Options]]

CONFIGS = Path(__file__).parents[3] / "configs"
_SELCON = "MODEL.SELCON."


@dataclass(frozen=True)
class Protocol:
    """Backbone, input size and schedule for all methods.

    Attributes:
        name: Name on the command line.
        configs: Config of each method, by the name of its row.
        common: Options of all runs.
        groups: Groups of changes to try, by method.
        own: Options of individual methods, by method.
        eval_period: Epochs between evaluations while settings are chosen.
    """

    name: str
    configs: Mapping[str, Path]
    common: Options
    groups: Mapping[str, Groups]
    own: Mapping[str, Options]
    eval_period: int

    def base(self, method: str) -> Options:
        """Return the options of a method's config without changes."""
        return {**self.own.get(method, {}), **self.common}

    def with_options(self, options: Options) -> Protocol:
        """Fix options for all runs and drop the groups that would change them."""
        kept = {
            method: {
                name: levels
                for name, levels in groups.items()
                if not any(key in options for change in levels.values() for key in change)
            }
            for method, groups in self.groups.items()
        }
        return replace(self, common={**self.common, **options}, groups=kept)

    def only(self, names: Sequence[str]) -> Protocol:
        """Keep some methods, or some of a method's groups.

        Args:
            names: ``METHOD`` for a method and all its groups, ``METHOD/GROUP`` for the
                method and only this group, ``METHOD/GROUP/LEVEL`` for one level of it,
                ``METHOD/`` for the method without changes, ``methods`` for all methods
                without changes. Empty for all.

        Returns:
            The reduced protocol.

        Raises:
            ValueError: If there is no such method, group or level.
        """
        if not names:
            return self
        configs: dict[str, Path] = {}
        groups: dict[str, dict[str, dict[str, Options]]] = {}
        for name in names:
            if name == "methods":
                configs.update(self.configs)
                continue
            method, *path = name.split("/", maxsplit=2)
            found = self._levels_at(method, path)
            if found is None:
                legal = ["methods", *self.configs]
                for m, of in self.groups.items():
                    legal += [f"{m}/{g}[/{'|'.join(levels)}]" for g, levels in of.items()]
                raise ValueError(f"--only {name}: legal are {', '.join(legal)}")
            configs[method] = self.configs[method]
            for group, levels in found.items():
                groups.setdefault(method, {}).setdefault(group, {}).update(levels)
        return replace(self, configs=configs, groups=groups)

    def _levels_at(self, method: str, path: Sequence[str]) -> Groups | None:
        """Return the changes under a name; None for an unknown name."""
        if method not in self.configs:
            return None
        groups = self.groups.get(method, {})
        if not path or path == [""]:
            return {} if path else groups
        group, *level = path
        levels = groups.get(group, {})
        if level:
            levels = {name: options for name, options in levels.items() if name in level}
        return {group: levels} if levels else None


def variant_name(changes: Mapping[str, str]) -> str:
    """Return the name of a config with changes.

    Args:
        changes: Level of each changed group.

    Returns:
        Name such as ``"base"`` or ``"eps-auto+ghost_bn-16"``, independent of the order.
    """
    return "+".join(f"{g}-{level}" for g, level in sorted(changes.items())) or "base"


def options_of(groups: Groups, changes: Mapping[str, str]) -> Options:
    """Return the options of changes.

    Args:
        groups: Groups of the method.
        changes: Level of each changed group.

    Returns:
        Keys and values.
    """
    options: Options = {}
    for group in sorted(changes):
        options.update(groups[group][changes[group]])
    return options


def parse_options(arguments: Sequence[str]) -> Options:
    """Parse ``KEY VALUE`` pairs like a config: Python literals, or text.

    Args:
        arguments: Alternating keys and values.

    Returns:
        Keys and values.

    Raises:
        ValueError: If a value is missing.
    """
    if len(arguments) % 2:
        raise ValueError(f"the key {arguments[-1]} has no value: KEY VALUE")
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return {key: _literal(value) for key, value in pairs}


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _levels(key: str, *values: Any) -> dict[str, Options]:
    """Return one level for each value of one key of the method."""
    return {str(value): {_SELCON + key: value} for value in values}


def _configs(folder: str, *, without: Sequence[str]) -> dict[str, Path]:
    """Return the config of each method; those with changes to try come first."""
    first = ("scl", "scl_paper", "selcon_cluster", "cluster_contrast")
    files = (CONFIGS / folder).glob("*.yml")
    found = {file.stem.removesuffix("_R50"): file for file in files}
    names = sorted(found, key=lambda name: (name not in first, name))
    return {name: found[name] for name in names if name not in without}


_CAMERA_WEIGHT = _levels("CAMERA_WEIGHT", "batch", "cluster", "multi_camera")
_NO_ERASING = {"off": {"INPUT.REA.ENABLED": False}}
_TEACHER = _levels("EMA_DECAY", 0.99, 0.999)
_AVERAGE_POOLING = {"average": {"MODEL.HEADS.POOL_LAYER": "GlobalAvgPool"}}

# Differences of the released code from the equations' defaults, and the sizes K and N.
_SCL: dict[str, Mapping[str, Options]] = {
    "mixture_update": _levels("MIXTURE_UPDATE", "self"),
    "normalize_parts": _levels("NORMALIZE_PARTS", True),
    "camera_term": {"off": {f"{_SELCON}SAME_CAMERA_PENALTY": 0.0}},
    "negative_cameras": _levels("NEGATIVE_CAMERAS", "own", "unbiased"),
    "parts": {"off": {f"{_SELCON}NUM_PARTS": 0}},
    "neighbors": _levels("NUM_NEIGHBORS", 3, 15),
}
_SELCON_CLUSTER: dict[str, Mapping[str, Options]] = {
    "selection": {
        "jaccard": {f"{_SELCON}SELECTION": "jaccard"},
        # Without clusters: ranking by the fused distance in every batch.
        "distance": {
            f"{_SELCON}METHOD": "SelectiveContrastive",
            f"{_SELCON}SELECTION": "distance",
            f"{_SELCON}NORMALIZE_PARTS": True,
        },
    },
    "pooling": _AVERAGE_POOLING,
    "camera_weight": _CAMERA_WEIGHT,
    "center_cameras": _levels("CLUSTERING.CENTER_CAMERAS", False),
    "camera_term": {"off": {f"{_SELCON}SAME_CAMERA_PENALTY": 0.0}},
    "negative_cameras": _levels("NEGATIVE_CAMERAS", "all", "own"),
    "mixture_update": _levels("MIXTURE_UPDATE", "self"),
    "neighbors": _levels("NUM_NEIGHBORS", 7, 15),
    "negatives": _levels("NUM_NEGATIVES", 500, 1000),
    "sampler": _levels("SAMPLER", "pk", "proxy"),
    "self_weight": _levels("SELF_WEIGHT", 0.3, 0.5),
    "center_weight": _levels("CENTER_WEIGHT", 0.0, 0.5),
    "focal": _levels("FOCAL_GAMMA", 2.0),
    "parts": _levels("NUM_PARTS", 4),
    "erasing": _NO_ERASING,
    "teacher": _TEACHER,
}
_CLUSTER_CONTRAST: dict[str, Mapping[str, Options]] = {
    "cluster_update": _levels("CLUSTER_UPDATE", "hard"),
    "pooling": _AVERAGE_POOLING,
    "camera_weight": _CAMERA_WEIGHT,
    "center_cameras": _levels("CLUSTERING.CENTER_CAMERAS", True),
    "focal": _levels("FOCAL_GAMMA", 2.0),
    "erasing": _NO_ERASING,
    "teacher": _TEACHER,
}

_ON_CPU: dict[str, Mapping[str, Options]] = {
    "ghost_bn": _levels("GHOST_BATCH_SIZE", 16),
    "eps": _levels("CLUSTERING.EPS", 0.5, 0.6, 0.7),
    "color_jitter": {"off": {"INPUT.CJ.ENABLED": False}},
}
_CPU_CONFIGS = _configs("SyntheticPersons", without=("base", "vitc_tiny_vit"))
# Configs of the synthetic data: EfficientNet-Lite0 at 128x64, SGD, unsupervised eps; and
# the released recipe of the method with that network.
_CPU = Protocol(
    name="cpu",
    configs={**_CPU_CONFIGS, "scl_paper": CONFIGS / "Market1501" / "scl_paper_R50.yml"},
    common={
        "SOLVER.MAX_EPOCH": 12,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        f"{_SELCON}KEEP_CHECKPOINTS": 1,
    },
    groups={
        "scl": {**_SCL, "negatives": _levels("NUM_NEGATIVES", 50, 500)},
        "selcon_cluster": {**_SELCON_CLUSTER, **_ON_CPU},
        "cluster_contrast": {**_CLUSTER_CONTRAST, **_ON_CPU},
    },
    own={
        "scl_paper": {
            "MODEL.BACKBONE.NAME": "build_timm_backbone",
            "MODEL.BACKBONE.TIMM_NAME": "tf_efficientnet_lite0",
            "MODEL.BACKBONE.PRETRAIN_PATH": "pypi:efficientnet_lite0",
            "MODEL.BACKBONE.LAST_STRIDE": 2,
            "INPUT.SIZE_TRAIN": [128, 64],
            "INPUT.SIZE_TEST": [128, 64],
            f"{_SELCON}NUM_PARTS": 4,  # of a map of 4 rows
        },
        "selcon_cluster": {f"{_SELCON}NUM_NEGATIVES": 3000},  # 900 of 1,000 images there
    },
    eval_period=2,
)

_ON_GPU: dict[str, Mapping[str, Options]] = {
    "ghost_bn": {
        **_levels("GHOST_BATCH_SIZE", 16, 32),
        "off": {f"{_SELCON}GHOST_BATCH_SIZE": 0},
    },
    "eps": _levels("CLUSTERING.EPS", 0.4, 0.5, 0.7, "auto"),
    "schedule": {
        "25": {"SOLVER.MAX_EPOCH": 25, "SOLVER.STEPS": [10, 20]},
        "100": {"SOLVER.MAX_EPOCH": 100, "SOLVER.STEPS": [40, 80]},
    },
    "instances": {"8": {"DATALOADER.NUM_INSTANCE": 8}},
    "mixed_precision": {
        "off": {"SOLVER.AMP.ENABLED": False},
        "bfloat16": {"SOLVER.AMP.DTYPE": "bfloat16"},
    },
}

_GPU = Protocol(
    name="gpu",
    configs=_configs("Market1501", without=("base_cluster",)),
    common={
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.CHECKPOINT_PERIOD": 5,
        f"{_SELCON}KEEP_CHECKPOINTS": 1,
    },
    groups={
        "scl_paper": {
            **_SCL,
            "negatives": _levels("NUM_NEGATIVES", 100, 2000),
            "mixed_precision": _ON_GPU["mixed_precision"],
        },
        "selcon_cluster": {**_SELCON_CLUSTER, **_ON_GPU},
        "cluster_contrast": {**_CLUSTER_CONTRAST, **_ON_GPU},
    },
    own={},
    eval_period=5,
)

PROTOCOLS = {protocol.name: protocol for protocol in (_GPU, _CPU)}

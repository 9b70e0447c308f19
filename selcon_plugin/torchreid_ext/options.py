"""Options of an engine, divided into those of the run, the method and the clustering."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from yacs.config import CfgNode

from selcon_plugin.clustering import (
    Labeler,
    labeler_class,
    labeler_names,
    labeler_options,
)
from selcon_plugin.config.keys import (
    clustering_options,
    configured_labeler,
    run_options,
)
from selcon_plugin.engine.run_options import ClusteringOptions, RunOptions
from selcon_plugin.methods import method_options
from selcon_plugin.options import check_options
from selcon_plugin.renamed import accept_renamed
from selcon_plugin.torchreid_ext.config import KEYS

# Options of a run that belong to the model, which is a separate object in torchreid.
MODEL_OPTIONS = ("num_parts", "project_global", "ghost_batch_size", "wave_block")
# Arguments of the engines that are named, in addition to options.
_ARGUMENTS = ("method", "clustering", "num_instances", "head", "checkpoint_period")
# Arguments of torchreid's ImageSoftmaxEngine and ImageTripletEngine.
_SUPERVISED = ("label_smooth", "margin", "weight_t", "weight_x")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """Checked options of an engine.

    Attributes:
        run: Options of the run, including its method; those of the model are not used.
        method: Constructor arguments of the method.
        clustering: Options of the clustering.
        labeler: Labeler, which clusters the images.
        labeler_options: Its options by name, as far as they are known.
    """

    run: RunOptions
    method: Mapping[str, Any]
    clustering: ClusteringOptions
    labeler: Labeler
    labeler_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_config(cls, cfg: CfgNode) -> EngineOptions:
        """Read the options of a config.

        Args:
            cfg: Complete config.

        Returns:
            The options.
        """
        node = cfg.selcon
        return cls(
            KEYS.run(node),
            KEYS.selected(node, "method"),
            KEYS.clustering(node),
            KEYS.labeler(node),
            KEYS.selected(node, "labeler"),
        )

    @classmethod
    def of_arguments(
        cls,
        method: str,
        clustering: Labeler | Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> EngineOptions:
        """Read and check the arguments that a script passes to an engine.

        Args:
            method: Registered name of the method.
            clustering: Labeler, options of clustering and labeler, or None.
            options: Options of the run and of the method, by name.

        Returns:
            The options.

        Raises:
            ValueError: If an option is unknown, invalid, or set by two names.
        """
        own, run = method_options(method), run_options()
        for name in ("method", *MODEL_OPTIONS):
            del run[name]
        given = _without_supervised(accept_renamed(options), own)
        of_method = {name: value for name, value in given.items() if name not in run}
        unknown = [name for name in of_method if name not in own]
        if unknown:
            close = difflib.get_close_matches(unknown[0], [*own, *run, *_ARGUMENTS], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"ImageSelConEngine has no option {unknown[0]} with the method {method}: "
                f"{hint}Its options are {', '.join(run)}; those of the method are "
                f"{', '.join(own)}"
            )
        of_run = {name: value for name, value in given.items() if name in run}
        checked = RunOptions(
            method=method, **check_options(run, of_run, owner="ImageSelConEngine")
        )
        arguments = check_options(own, of_method, owner=method)
        if "seed" in own:
            arguments["seed"] = checked.seed
        return cls(checked, arguments, *_read_clustering(clustering))

    def settings(self) -> dict[str, Any]:
        """Return all options by full name, for comparison when a run resumes."""
        labeler = {
            name: value
            for name, value in vars(self.labeler).items()
            if isinstance(value, (bool, int, float, str))
        }
        own = {k: o.default for k, o in method_options(self.run.method).items()}
        return {
            **{f"selcon.{k}": v for k, v in {**own, **self.method}.items()},
            **{f"selcon.{k}": v for k, v in vars(self.run).items()},
            **{f"selcon.clustering.{k}": v for k, v in vars(self.clustering).items()},
            "selcon.clustering.labeler": type(self.labeler).__name__,
            **{f"selcon.clustering.{k}": v for k, v in labeler.items() if k[0] != "_"},
        }


def _without_supervised(options: dict[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Leave out arguments of torchreid's supervised engines, and name them in a warning.

    Args:
        options: Arguments of a script.
        own: Options of the method.

    Returns:
        The other arguments.
    """
    unused = [name for name in options if name in _SUPERVISED and name not in own]
    if unused:
        logger.warning(
            "%s of torchreid's supervised engines %s no effect: the loss is that of the "
            "method",
            ", ".join(unused),
            "has" if len(unused) == 1 else "have",
        )
    return {name: value for name, value in options.items() if name not in unused}


def _read_clustering(
    given: Labeler | Mapping[str, Any] | None,
) -> tuple[ClusteringOptions, Labeler, Mapping[str, Any]]:
    """Read the engine's argument ``clustering``."""
    if isinstance(given, Labeler):
        name = next((n for n in labeler_names() if type(given) is labeler_class(n)), "")
        if not name:
            return ClusteringOptions(), given, {}
        own = {key: vars(given)[key] for key in labeler_options(name) if key in vars(given)}
        return ClusteringOptions(labeler=name), given, own
    values, known = dict(given or {}), clustering_options()
    own = {name: values.pop(name) for name in list(values) if name in known}
    clustering = ClusteringOptions(**check_options(known, own, owner="clustering"))
    options = labeler_options(clustering.labeler)
    for name in values:
        if name not in options:
            raise ValueError(
                f"clustering has no option {name} with the labeler {clustering.labeler}. "
                f"Its options are {', '.join(known)}; those of the labeler are "
                f"{', '.join(options)}"
            )
    checked = check_options(options, values, owner=clustering.labeler)
    return clustering, configured_labeler(clustering, checked), checked

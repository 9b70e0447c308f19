"""Options of an engine, divided into those of the run, the method and the clustering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from selcon_plugin.clustering import Labeler, labeler_options
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


@dataclass(frozen=True)
class EngineOptions:
    """Checked options of an engine.

    Attributes:
        run: Options of the run, including its method; those of the model are not used.
        method: Constructor arguments of the method.
        clustering: Options of the clustering.
        labeler: Labeler, which clusters the images.
    """

    run: RunOptions
    method: Mapping[str, Any]
    clustering: ClusteringOptions
    labeler: Labeler

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
        given = accept_renamed(options)
        of_method = {name: value for name, value in given.items() if name not in run}
        unknown = [name for name in of_method if name not in own]
        if unknown:
            raise ValueError(
                f"ImageSelConEngine has no option {unknown[0]} with the method {method}. "
                f"Its options are {', '.join(run)}; those of the method are "
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


def _read_clustering(
    given: Labeler | Mapping[str, Any] | None,
) -> tuple[ClusteringOptions, Labeler]:
    """Read the engine's argument ``clustering``."""
    if isinstance(given, Labeler):
        return ClusteringOptions(), given
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
    return clustering, configured_labeler(clustering, checked)

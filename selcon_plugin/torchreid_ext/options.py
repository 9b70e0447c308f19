"""Divide the engine's options into those of the run, the method and the clustering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selcon_plugin.clustering import Labeler, labeler_options
from selcon_plugin.config.keys import (
    clustering_options,
    configured_labeler,
    run_options,
)
from selcon_plugin.methods import method_options
from selcon_plugin.options import check_options

# Options of a run that are the model's, in torchreid a thing of its own.
MODEL_OPTIONS = ("num_parts", "project_global", "ghost_batch_size", "wave_block")


def _sort_options(
    method: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide options into those of the run, complete, and those of the method."""
    own = method_options(method)
    run = run_options()
    for name in ("method", *MODEL_OPTIONS):
        del run[name]
    chosen = {name: value for name, value in options.items() if name in run}
    rest = {name: value for name, value in options.items() if name not in run}
    unknown = [name for name in rest if name not in own]
    if unknown:
        raise ValueError(
            f"ImageSelConEngine has no option {unknown[0]} with the method {method}: it "
            f"has {', '.join(run)}, and of the method {', '.join(own)}"
        )
    values = {name: option.default for name, option in run.items()}
    values |= check_options(run, chosen, owner="ImageSelConEngine")
    if "seed" in own:
        rest["seed"] = values["seed"]
    return values, check_options(own, rest, owner=method)


def _read_clustering(
    clustering: Labeler | Mapping[str, Any] | None,
) -> tuple[dict[str, Any], Labeler]:
    """Read the argument ``clustering`` into its own values and a labeler."""
    known = clustering_options()
    values = {name: option.default for name, option in known.items()}
    if isinstance(clustering, Labeler):
        return values, clustering
    given = dict(clustering or {})
    own = {name: given.pop(name) for name in list(given) if name in known}
    values |= check_options(known, own, owner="clustering")
    options = labeler_options(values["labeler"])
    for name in given:
        if name not in options:
            raise ValueError(
                f"clustering has no option {name} with the labeler {values['labeler']}: it "
                f"has {', '.join(known)}, and of the labeler {', '.join(options)}"
            )
    checked = check_options(options, given, owner=values["labeler"])
    return values, configured_labeler(values, checked)

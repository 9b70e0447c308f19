"""Markdown page with the results of the study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from market_study.runs import Variant

_BASE = "base"


def page(
    protocol: str,
    chosen_from: Sequence[Variant],
    reported: Sequence[Variant],
    correlation: str,
) -> str:
    """Format the page.

    Args:
        protocol: Name of the protocol.
        chosen_from: Variants tried on the held-out identities.
        reported: Variants measured on the official test set.
        correlation: Table of label-free metrics, or empty.

    Returns:
        Markdown; parts without a finished run are omitted.
    """
    parts = [f"# Market-1501, protocol {protocol}"]
    if any(variant.results() for variant in reported):
        parts += ["## Official test set", _table(reported)]
    bases = [variant for variant in chosen_from if variant.name == _BASE]
    if any(variant.results() for variant in bases):
        parts += ["## Methods on held-out identities", _table(bases)]
    for method in dict.fromkeys(variant.method for variant in chosen_from):
        tried = [variant for variant in chosen_from if variant.method == method]
        if sum(bool(variant.results()) for variant in tried) > 1:
            parts += [f"## Changes of {method} on held-out identities", _changes(tried)]
    if correlation:
        parts += ["## Label-free metrics", correlation.rstrip()]
    parts += ["## Commands", _commands([*reported, *chosen_from])]
    machines = dict.fromkeys(
        _machine(results)
        for variant in (*reported, *chosen_from)
        for results in variant.results().values()
    )
    parts += ["\n".join(f"* {machine}" for machine in machines)] if machines else []
    return "\n\n".join(parts) + "\n"


def _table(variants: Sequence[Variant]) -> str:
    """Return a table with one row per variant, best first."""
    head = "| row | seeds | mAP | Rank-1 | mINP | minutes | memory (MiB) | clusters |"
    lines = [f"{head} commit |", "| --- " * 9 + "|"]
    for variant in sorted(variants, key=lambda v: -(_mean(v, "mAP") or 0.0)):
        results = list(variant.results().values())
        if not results:
            lines.append(f"| {_row_name(variant)} | 0 |" + " - |" * 6 + _commit(variant))
            continue
        cells = [_mean_std(_metric(results, name)) for name in ("mAP", "Rank-1", "mINP")]
        cells.append(_mean_std([r["train_seconds"] / 60 for r in results]))
        cells.append(_memory(results))
        counts = [r["num_clusters"] for r in results if r["num_clusters"] is not None]
        cells.append(f"{statistics.fmean(counts):.0f}" if counts else "-")
        lines.append(
            f"| {_row_name(variant)} | {len(results)} | {' | '.join(cells)} |"
            f"{_commit(variant)}"
        )
    return "\n".join(lines)


def _changes(variants: Sequence[Variant]) -> str:
    """Return a table of each change's validation mAP and its gain over the base config."""
    base = next((v for v in variants if v.name == _BASE), None)
    base_map = None if base is None else _mean(base, "mAP")
    lines = ["| change | seeds | mAP | gain | Rank-1 |", "| --- " * 5 + "|"]
    for variant in sorted(variants, key=lambda v: -(_mean(v, "mAP") or 0.0)):
        results = list(variant.results().values())
        mean = _mean(variant, "mAP")
        gain = "-" if mean is None or base_map is None else f"{mean - base_map:+.1f}"
        lines.append(
            f"| {variant.name} | {len(results)} | {_mean_std(_metric(results, 'mAP'))} | "
            f"{gain} | {_mean_std(_metric(results, 'Rank-1'))} |"
        )
    return "\n".join(lines)


def _commands(variants: Sequence[Variant]) -> str:
    head = ["| row | command (seed 0) |", "| --- | --- |"]
    return "\n".join([*head, *(f"| {_row_name(v)} | `{v.command()}` |" for v in variants)])


def _row_name(variant: Variant) -> str:
    return f"{variant.method} {variant.name}".removesuffix(f" {_BASE}")


def _commit(variant: Variant) -> str:
    return f" {variant.commit} |"


def _metric(results: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [found[name] for r in results for found in r["metrics"].values()]


def _mean(variant: Variant, name: str) -> float | None:
    values = _metric(list(variant.results().values()), name)
    return statistics.fmean(values) if values else None


def _mean_std(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _memory(results: Sequence[dict[str, Any]]) -> str:
    on_gpu = [r["peak_gpu_memory_mib"] for r in results if r["peak_gpu_memory_mib"]]
    if on_gpu:
        return f"{max(on_gpu):.0f} (GPU)"
    return f"{max(r['peak_memory_mib'] for r in results):.0f}"


def _machine(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    return f"{results['device']}; {versions}"

"""The table of ``selcon bench`` in LaTeX, for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex_text(text: str) -> str:
    r"""Escape a text for LaTeX.

    Args:
        text: Any text.

    Returns:
        Text that LaTeX shows as it is, in one line.

    Example:
        >>> print(latex_text("a_b & 50 %"))
        a\_b \& 50 \%
    """
    return "".join(
        _ESCAPED.get(character, character) for character in " ".join(text.split())
    )


def latex_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str],
    caption: str,
    comments: Sequence[str] = (),
) -> str:
    r"""Format rows as a table in the style of ``booktabs``.

    Metrics that no row has are left out. The best mean of each metric and test set is bold,
    without the supervised reference, which follows a rule.

    Args:
        rows: Result of :func:`selcon_plugin.workflows.bench_table.summarize`.
        metrics: Names of the metrics.
        caption: Caption of the table, without LaTeX.
        comments: Lines of comments above the table.

    Returns:
        The source; it needs ``\usepackage{booktabs}``.
    """
    shown = [n for n in metrics if any(row[f"{n}_mean"] is not None for row in rows)]
    header = ["Config", "Method", "Backbone", "Input", "Test set", "Seeds"]
    titles = [latex_text(name) for name in (*header, *shown)]
    ordered = sorted(rows, key=lambda row: bool(row.get("supervised")))
    lines = [f"% {' '.join(line.split())}" for line in comments]
    lines += [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{latex_text(caption)}}}",
        f"  \\begin{{tabular}}{{{'l' * (len(header) - 1)}{'r' * (len(shown) + 1)}}}",
        r"    \toprule",
        f"    {' & '.join(titles)} \\\\",
        r"    \midrule",
    ]
    before = False
    for row in ordered:
        if row.get("supervised") and not before and row is not ordered[0]:
            lines.append(r"    \midrule")
        before = bool(row.get("supervised"))
        lines.append(f"    {' & '.join(_cells(row, shown, rows))} \\\\")
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _cells(
    row: Mapping[str, Any], shown: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    finished, seeds = row["finished"], row["seeds"]
    count = str(seeds) if finished == seeds else f"{finished} of {seeds}"
    names = ("config", "method", "backbone", "input_size", "test_set")
    texts = [latex_text(str(row[name] or "-")) for name in names]
    return [*texts, count, *(_value(row, name, rows) for name in shown)]


def _value(row: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    if mean is None:
        return "--"
    peers = [
        other[f"{name}_mean"]
        for other in rows
        if other["test_set"] == row["test_set"]
        and not other.get("supervised")
        and other[f"{name}_mean"] is not None
    ]
    best = not row.get("supervised") and len(peers) > 1 and mean == max(peers)
    text = f"\\mathbf{{{mean:.1f}}}" if best else f"{mean:.1f}"
    return f"${text}$" if std is None else f"${text} \\pm {std:.1f}$"

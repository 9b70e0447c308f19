"""``selcon report``: what a run learned as one page; several runs side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from selcon_plugin.cli.arguments import add_import_argument
from selcon_plugin.config.loading import import_files
from selcon_plugin.report import write_comparison, write_report


def main(argv: list[str]) -> int:
    """Write a report.

    Args:
        argv: Arguments after ``selcon report``.

    Returns:
        Exit status 0.
    """
    parser = argparse.ArgumentParser(
        prog="selcon report",
        description="Write what a run learned as one HTML file that works offline; of "
        "several runs a comparison. Needs neither weights nor a GPU.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run: OUTPUT_DIR, in torchreid data.save_dir",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="FILE.html",
        help="default: report.html in the run's folder; comparison.html of several runs",
    )
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="leave all crops out; default: as the run's REPORT_IMAGES says",
    )
    add_import_argument(parser)
    args = parser.parse_args(argv)
    import_files(args.imports)
    if len(args.runs) == 1:
        file = write_report(
            args.runs[0],
            args.output,
            images=False if args.no_images else None,
            defaults_of=_defaults_of,
        )
    else:
        output = args.output or "comparison.html"
        file = write_comparison(args.runs, output, defaults_of=_defaults_of)
    sys.stdout.write(f"{file} ({file.stat().st_size / 1e6:.1f} MB)\n")
    return 0


def _defaults_of(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the defaults of the host that trained; None where it is not installed."""
    try:
        if "selcon.method" in settings:
            from selcon_plugin.torchreid_ext.config import default_values
        else:
            from selcon_plugin.fastreid_ext.config import default_values
    except ImportError:
        return None
    return default_values(settings)

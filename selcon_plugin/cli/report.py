"""``selcon report``: write the HTML report of a run, or compare several runs."""

from __future__ import annotations

import sys

from selcon_plugin.cli.arguments import add_import_argument
from selcon_plugin.cli.parsing import CommandParser
from selcon_plugin.config.importing import import_files
from selcon_plugin.hosts import host_of_settings
from selcon_plugin.io.output_files import PAGES, check_output_file
from selcon_plugin.report import write_comparison, write_report


def main(argv: list[str]) -> int:
    """Write a report.

    Args:
        argv: Arguments after ``selcon report``.

    Returns:
        Exit status 0.
    """
    args = _parser().parse_args(argv)
    if args.output:
        check_output_file(args.output, name="--output", kinds=PAGES)
    import_files(args.imports)
    if len(args.runs) == 1:
        file = write_report(
            args.runs[0],
            args.output,
            images=False if args.no_images else None,
            find_host=host_of_settings,
        )
    else:
        output = args.output or "comparison.html"
        file = write_comparison(args.runs, output, find_host=host_of_settings)
    sys.stdout.write(f"{file} ({file.stat().st_size / 1e6:.1f} MB)\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon report",
        description="Write the report of a run as one HTML file that works offline, or a "
        "comparison of several runs. Neither weights nor a GPU are needed.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run: OUTPUT_DIR (torchreid: data.save_dir)",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="FILE.html",
        help="file to write; default: report.html in the run's folder, or comparison.html "
        "for several runs",
    )
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="show no crops; default: the run's option REPORT_IMAGES",
    )
    add_import_argument(parser)
    return parser

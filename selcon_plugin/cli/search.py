"""``selcon search``: find the persons of query images in an index."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from selcon_plugin.cli.arguments import (
    add_device_argument,
    add_network_arguments,
    network_source,
)
from selcon_plugin.cli.parsing import CommandParser, whole_number
from selcon_plugin.datasets.reading import ImageReadError
from selcon_plugin.io.names import printable
from selcon_plugin.io.output_files import PAGES, check_output_file
from selcon_plugin.retrieval import Index, QueryResult, search
from selcon_plugin.retrieval.page import write_page


def main(argv: list[str]) -> int:
    """Search an index, and write a table, JSON or an HTML page.

    Args:
        argv: Arguments after ``selcon search``.

    Returns:
        Exit status: 0, even if no image reaches the threshold.

    Raises:
        ValueError: If a query cannot be read.
    """
    args = _parser().parse_args(argv)
    if args.html:
        check_output_file(args.html, name="--html", kinds=PAGES, inputs=args.queries)
    index = Index.open(args.index)
    threshold, description, is_clear = _threshold(
        index,
        args.threshold,
        across_cameras=bool(args.camera or args.not_camera),
        center_cameras=args.center_cameras,
    )
    source = network_source(args) or index.source
    if source is None:
        raise ValueError(
            "the index does not record its network: give --weights FILE or --onnx FILE"
        )
    try:
        results = search(
            index,
            args.queries,
            embedder=source.load(args.device),
            top=args.top,
            camera=args.camera,
            not_camera=args.not_camera,
            threshold=threshold,
            center_cameras=args.center_cameras,
            query_camera=args.query_camera,
        )
    except ImageReadError as error:
        raise ValueError(f"a query cannot be read: {error}") from error
    if args.json:
        content = {
            "index": args.index,
            "threshold": None if threshold == -1.0 else threshold,
            "threshold_is_clear": is_clear,
            "queries": [asdict(result) for result in results],
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        note = f"threshold {description}\n" if description else ""
        sys.stdout.write(_table(results) + note)
    if args.html:
        note = f" Threshold {description}." if description else ""
        summary = f"{args.index}: {index}.{note}"
        write_page(args.html, results, summary=summary, show_images=args.images)
        sys.stderr.write(f"{args.html} written\n")
    return 0


def _threshold(
    index: Index, given: str, *, across_cameras: bool, center_cameras: bool
) -> tuple[float, str, bool | None]:
    """Return the threshold, its description, and whether it is clear; None if not auto."""
    if not given:
        return -1.0, "", None
    if given == "auto":
        found = index.suggest_threshold(
            across_cameras=across_cameras, center_cameras=center_cameras
        )
        return found.threshold, str(found), found.is_clear
    try:
        value = float(given)
    except ValueError:
        value = float("nan")
    if not -1.0 <= value <= 1.0:
        raise ValueError(
            f"--threshold must be auto or a cosine between -1 and 1, got {given!r}"
        )
    return value, f"{value:g}", None


def _table(results: Sequence[QueryResult]) -> str:
    """Return a table per query."""
    lines = []
    for result in results:
        lines.append(printable(result.query))
        lines.append("  rank  cosine  camera      image")
        if result.below:
            lines.append("  no image reaches the threshold; the nearest below it:")
        elif not result.matches:
            # The cameras, or the query itself, leave none.
            lines.append("  no image is left to compare with")
        lines.extend(
            f"  {rank:4d}  {match.similarity:6.3f}  {printable(match.camera or '-'):10s}  "
            f"{printable(match.path)}"
            for rank, match in enumerate(result.matches or result.below, start=1)
        )
    return "\n".join(lines) + "\n"


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon search",
        description="Find the persons of query images in an index built by selcon index.",
    )
    parser.add_argument("queries", nargs="+", metavar="IMAGE", help="image of a person")
    parser.add_argument(
        "--index", required=True, metavar="FOLDER", help="folder of the index"
    )
    parser.add_argument(
        "--top",
        type=whole_number(1),
        default=10,
        help="number of results per query; default: 10",
    )
    parser.add_argument(
        "--camera", action="append", default=[], metavar="NAME",
        help="search this camera only; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--not-camera", action="append", default=[], metavar="NAME",
        help="do not search this camera; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--threshold",
        default="",
        metavar="auto|COSINE",
        help="smallest cosine similarity of a result; auto: unsupervised choice from the "
        "features of the index; default: no threshold",
    )
    parser.add_argument(
        "--center-cameras",
        action="store_true",
        help="remove what the images of a camera have in common; for searches in other "
        "cameras, with two cameras of at least 100 images",
    )
    parser.add_argument(
        "--query-camera", metavar="NAME",
        help="camera of images that are not in the index, for --center-cameras",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.add_argument(
        "--html", default="", metavar="FILE", help="also write the results as an HTML page"
    )
    parser.add_argument(
        "--no-images",
        action="store_false",
        dest="images",
        help="write the page without images",
    )
    add_network_arguments(parser)
    add_device_argument(parser)
    return parser

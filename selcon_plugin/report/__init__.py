"""The HTML report of a run, the page that compares runs, and result images.

Code that reads a finished or interrupted run and visualizes it belongs here. Code that
trains, evaluates or writes the records of a run does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from selcon_plugin.config.host import Host
from selcon_plugin.distributed import rank
from selcon_plugin.io.atomic import make_folder, write_atomically
from selcon_plugin.io.output_files import PAGES, check_output_file
from selcon_plugin.report.collect import FindHost, RunData, collect_run
from selcon_plugin.report.compare import comparison_page
from selcon_plugin.report.page import run_page

__all__ = ["RunData", "collect_run", "finish_run", "write_comparison", "write_report"]

REPORT_FILE = "report.html"

logger = logging.getLogger(__name__)


def write_report(
    folder: str | Path,
    output: str | Path = "",
    *,
    images: bool | None = None,
    find_host: FindHost | None = None,
) -> Path:
    """Write the report of a run.

    Args:
        folder: Folder of the run, finished or not.
        output: HTML file to write; by default ``report.html`` in the folder.
        images: Whether to show crops; None for the run's option ``report_images``.
        find_host: Returns the host of a run's settings.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If an existing file named ``output`` is not a page.
    """  # noqa: DOC502  (raised by the functions called here)
    if output:
        check_output_file(output, name="output", kinds=PAGES)
    run = _readable_run(folder, find_host)
    if images is None:
        images = run.setting("report_images") is not False
    file = Path(output or Path(folder) / REPORT_FILE)
    make_folder(file.parent)
    write_atomically(run_page(run, images=images), file)
    return file


def write_comparison(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    find_host: FindHost | None = None,
) -> Path:
    """Write a page that compares runs.

    Args:
        folders: Folders of two or more runs.
        output: HTML file to write.
        find_host: Returns the host of a run's settings.

    Returns:
        The file.

    Raises:
        ValueError: If fewer than two folders are given, or one of them twice, or an
            existing file named ``output`` is not a page.
            ``FileNotFoundError`` if a folder contains no run.
    """
    check_output_file(output, name="output", kinds=PAGES)
    resolved = [Path(folder).resolve() for folder in folders]
    if len(set(resolved)) < max(2, len(resolved)):
        raise ValueError("a comparison needs at least two runs, each given once")
    runs = [_readable_run(folder, find_host) for folder in folders]
    file = Path(output)
    make_folder(file.parent)
    write_atomically(comparison_page(runs), file)
    return file


def _readable_run(folder: str | Path, find_host: FindHost | None) -> RunData:
    """Read a run, and name its damaged records also to who does not read the page."""
    run = collect_run(folder, find_host=find_host)
    for text in run.broken:
        logger.warning("A record of %s is not shown: %s", folder, text)
    return run


def finish_run(folder: str | Path, host: Host | None = None) -> None:
    """Write the report at the end of a run, on the main process only.

    An error is logged and does not fail the run.

    Args:
        folder: Folder of the run; nothing is written if it is empty.
        host: The host that trained the run.
    """
    if not folder or rank() > 0:
        return
    try:
        file = write_report(folder, find_host=lambda _: host)
    except Exception as error:
        logger.warning("The report could not be written: %s", error)
    else:
        logger.info("Report: %s", file)

"""``selcon run``: run a host's own training script, unedited, without identity labels."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from selcon_plugin.cli.parsing import CommandParser
from selcon_plugin.hosts import get_host, host_names


def _parser() -> CommandParser:
    result = CommandParser(
        prog="selcon run",
        description="Run FastReID's tools/train_net.py, torchreid's scripts/main.py, or a "
        "script like them, without an edit. FastReID's trains without identities with "
        "META_ARCHITECTURE: SelCon in its config, other configs train as before; "
        "torchreid's always does, and takes keys such as selcon.method.",
    )
    result.add_argument("script", metavar="SCRIPT", help="Python file to run")
    result.add_argument(
        "arguments",
        metavar="ARGUMENTS",
        nargs=argparse.REMAINDER,
        default=[],
        help="arguments of the script, for example --config-file my.yml --num-gpus 2",
    )
    return result


def main(argv: list[str]) -> int:
    """Run a script.

    Args:
        argv: Arguments after ``selcon run``.

    Returns:
        Exit status 0; the script may end with another one.

    Raises:
        FileNotFoundError: If the script does not exist.
        ValueError: If it is not a Python file.
    """
    args = _parser().parse_args(argv)
    script = Path(args.script)
    if script.is_dir():
        raise ValueError(f"SCRIPT {args.script!r} is a folder: name a Python file in it")
    if not script.is_file():
        raise FileNotFoundError(f"SCRIPT {args.script!r} does not exist")
    if script.suffix != ".py":
        raise ValueError(f"SCRIPT {args.script!r} is not a Python file: it must end in .py")
    command = ["-m", "selcon_plugin", "run", str(script), *args.arguments]
    _prepare_hosts(script.read_text(encoding="utf-8", errors="replace"), command)
    arguments, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *args.arguments]
    sys.path.insert(0, str(script.resolve().parent))  # as Python itself does
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = arguments, path
    return 0


def _prepare_hosts(source: str, command: list[str]) -> None:
    """Prepare the hosts that a script names; all of them if it names none."""
    named = [name for name in host_names() if name in source]
    for name in named or host_names():
        try:
            host = get_host(name)
        except ImportError:
            if named:
                raise
            continue
        host.prepare_script(command)

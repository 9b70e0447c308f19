"""``selcon config``: explain and list the config keys."""

from __future__ import annotations

import argparse
import sys

from selcon_plugin.cli.arguments import add_import_argument
from selcon_plugin.config.loading import import_files
from selcon_plugin.hosts import DEFAULT_HOST, get_host, host_names, host_of_keys


def main(argv: list[str]) -> int:
    """List the plugin's config keys, or explain one.

    Args:
        argv: Arguments after ``selcon config``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If the key does not exist; the message suggests the closest one.
    """  # noqa: DOC502  (raised by the functions called here)
    parser = argparse.ArgumentParser(
        prog="selcon config",
        description="Explain a config key, its default and legal values, and which host, "
        "method or labeler has it.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--explain",
        metavar="KEY",
        help="a key of either host, such as MODEL.SELCON.TEMPERATURE or "
        "selcon.clustering.eps, or the end of a key, such as temperature",
    )
    action.add_argument("--list", action="store_true", help="list all keys of the plugin")
    parser.add_argument(
        "--host",
        choices=host_names(),
        default="",
        help="host of the config; default: the host that uses the given full key, "
        f"{DEFAULT_HOST} for the end of a key",
    )
    add_import_argument(parser)
    args = parser.parse_args(argv)
    import_files(args.imports)
    key = args.explain or ""
    named = host_of_keys([key]) if "." in key else DEFAULT_HOST
    config_help = get_host(args.host or named).help()
    if args.list:
        sys.stdout.write(f"{config_help.listing()}\n")
        return 0
    sys.stdout.write(f"{config_help.explain(config_help.find(key))}\n")
    return 0

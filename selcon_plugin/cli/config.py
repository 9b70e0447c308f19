"""``selcon config``: explain and list the config keys; list and copy configs."""

from __future__ import annotations

import argparse
import sys

from selcon_plugin.cli.arguments import add_import_argument
from selcon_plugin.cli.parsing import CommandParser
from selcon_plugin.config.files import builtin_configs, copy_builtin_config
from selcon_plugin.config.importing import import_files
from selcon_plugin.hosts import DEFAULT_HOST, get_host, host_names, host_of_keys


def main(argv: list[str]) -> int:
    """List the plugin's config keys or the package's configs, explain a key, copy a config.

    Args:
        argv: Arguments after ``selcon config``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If the key does not exist; the message suggests the closest one.
            ``FileNotFoundError`` if there is no such config, ``FileExistsError`` if a copy
            would replace another file.
    """  # noqa: DOC502  (raised by the functions called here)
    args = _parser().parse_args(argv)
    import_files(args.imports)
    if args.list_files:
        sys.stdout.write("\n".join(builtin_configs()) + "\n")
    elif args.copy:
        written = copy_builtin_config(args.copy, args.output)
        sys.stdout.write("".join(f"{file} written\n" for file in written))
    else:
        sys.stdout.write(f"{_about_keys(args)}\n")
    return 0


def _about_keys(args: argparse.Namespace) -> str:
    key = args.explain or ""
    named = host_of_keys([key]) if "." in key else DEFAULT_HOST
    config_help = get_host(args.host or named).help()
    return (
        config_help.listing() if args.list else config_help.explain(config_help.find(key))
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon config",
        description="Explain a config key, its default and legal values, and which host, "
        "method or labeler has it; or list and copy the configs of the package.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--explain",
        metavar="KEY",
        help="a key of either host, such as MODEL.SELCON.TEMPERATURE or "
        "selcon.clustering.eps, or the end of a key, such as temperature",
    )
    action.add_argument("--list", action="store_true", help="list all keys of the plugin")
    action.add_argument(
        "--list-files",
        action="store_true",
        help="list the configs of the package; --config-file accepts their names",
    )
    action.add_argument(
        "--copy",
        metavar="NAME",
        help="copy a config of the package with its bases; NAME as in --list-files",
    )
    parser.add_argument(
        "--output",
        default=".",
        metavar="FOLDER",
        help="folder for the copies; default: the current folder",
    )
    parser.add_argument(
        "--host",
        choices=host_names(),
        default="",
        help="host of the config; default: the host that uses the given full key, "
        f"{DEFAULT_HOST} for the end of a key",
    )
    add_import_argument(parser)
    return parser

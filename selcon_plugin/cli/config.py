"""``selcon config``: what the config keys mean."""

from __future__ import annotations

import argparse
import sys

from selcon_plugin.cli.arguments import add_import_argument
from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.help import ConfigHelp
from selcon_plugin.config.loading import import_files


def main(argv: list[str]) -> int:
    """List the plugin's config keys, or explain one.

    Args:
        argv: Arguments after ``selcon config``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If there is no such key; names the closest.
    """  # noqa: DOC502  (raised by what this calls)
    parser = argparse.ArgumentParser(
        prog="selcon config",
        description="What a config key does, its default and legal values, and who has it.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--explain",
        metavar="KEY",
        help="a key of either host, such as MODEL.SELCON.TEMPERATURE or "
        "selcon.clustering.eps; the end of one will do: temperature",
    )
    what.add_argument("--list", action="store_true", help="all keys of the plugin")
    parser.add_argument(
        "--host",
        choices=("fastreid", "torchreid"),
        default="",
        help="whose config; default: torchreid's for a full key in lower case, else "
        "FastReID's",
    )
    add_import_argument(parser)
    args = parser.parse_args(argv)
    import_files(args.imports)
    key = args.explain or ""
    full_lower_case = "." in key and key == key.lower()
    config_help = config_help_of(args.host or ("torchreid" if full_lower_case else ""))
    if args.list:
        sys.stdout.write(f"{config_help.listing()}\n")
        return 0
    sys.stdout.write(f"{config_help.explain(config_help.find(key))}\n")
    return 0


def config_help_of(host: str) -> ConfigHelp:
    """Collect what is known of a host's keys.

    Args:
        host: ``"torchreid"``, else FastReID.

    Returns:
        Help on its config.
    """
    if host == "torchreid":
        from selcon_plugin.torchreid_ext import config as torchreid_config

        return ConfigHelp(
            torchreid_config.KEYS,
            "torchreid",
            flatten_config(torchreid_config.get_default_config()),
            own=torchreid_config.OWN_OPTIONS,
            checked=torchreid_config.HOST_OPTIONS,
        )
    from selcon_plugin.fastreid_ext import add_selcon_config
    from selcon_plugin.fastreid_ext import config as fastreid_config

    from fastreid.config import get_cfg  # isort: skip  (mended by the import above)

    return ConfigHelp(
        fastreid_config.KEYS,
        "FastReID",
        flatten_config(add_selcon_config(get_cfg())),
        own=fastreid_config.OWN_OPTIONS,
        checked=fastreid_config.HOST_OPTIONS,
    )

"""Write the tables of config keys into the pages that show them.

    python tools/config_tables.py            # writes them
    python tools/config_tables.py --check    # status 1 if a page is not up to date

Each table stands between a line ``<!-- keys: NAME -->`` and ``<!-- keys: end -->``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from selcon_plugin.config.help import fill_tables, key_table
from selcon_plugin.hosts import get_host

ROOT = Path(__file__).resolve().parents[1]


def key_tables() -> dict[str, str]:
    """Return the tables of configs/README.md by name."""
    torchreid = get_host("torchreid").help()
    keys = torchreid.keys
    extra = [replace(o, name=f"{keys.path}.{keys.case(o.name)}") for o in keys.extra]
    tables = get_host("fastreid").help().tables()
    return {**tables, "torchreid": key_table([*extra, *torchreid.own])}


def pages() -> dict[Path, str]:
    """Return the pages with tables, as they should be."""
    tables = {ROOT / "configs" / "README.md": key_tables()}
    return {
        page: fill_tables(page.read_text(encoding="utf-8"), found)
        for page, found in tables.items()
    }


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = [
        page for page, text in pages().items() if page.read_text(encoding="utf-8") != text
    ]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'is stale' if args.check else 'is written'}")
        if not args.check:
            page.write_text(pages()[page], encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())

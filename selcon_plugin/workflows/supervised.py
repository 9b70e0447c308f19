"""Supervised reference of ``selcon bench``: a host's own baseline, trained with identities.

``python -m selcon_plugin.workflows.supervised CONFIG.yml [SCRIPT.py ...]`` trains it from a
config that the bench has written, in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from selcon_plugin.config.importing import import_files
from selcon_plugin.hosts import get_host, host_of, quiet_import

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Train the baseline of a config's host.

    Args:
        arguments: The config, and Python files to import first.

    Returns:
        Exit status: 0, or 2 if something is wrong that the user can correct.
    """
    config, *imports = arguments
    with quiet_import():
        import_files(imports)
        host = get_host(host_of(config))
    try:
        host.train_supervised(host.load_config(config))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"supervised reference: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

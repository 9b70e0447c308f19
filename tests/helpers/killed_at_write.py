"""``selcon`` in a process that SIGKILL ends at one of its writes, for ``run_program``.

Every file of a run gets its name by ``os.replace``. The names of those in the folder
``RUN_FOLDER`` are listed in the file ``WRITES``. ``KILL_AT`` is ``before N`` or
``after N``, counted from 1; without it nothing is killed.
"""

import os
import signal
import sys
from typing import Any

from selcon_plugin.cli.main import main

_rename = os.replace
_folder = os.path.realpath(os.environ.get("RUN_FOLDER", ""))
_order, _, _number = os.environ.get("KILL_AT", "").partition(" ")
_writes: list[str] = []


def _die_if(order: str) -> None:
    if (order, str(len(_writes))) == (_order, _number):
        os.kill(os.getpid(), signal.SIGKILL)


def _replace(source: Any, target: Any, **options: Any) -> None:
    name = os.path.relpath(os.path.realpath(target), _folder)
    if name.startswith(os.pardir):  # a cache of compiled functions
        _rename(source, target, **options)
        return
    _writes.append(name)
    with open(os.environ["WRITES"], "a", encoding="utf-8") as stream:
        stream.write(f"{name}\n")
    _die_if("before")
    _rename(source, target, **options)
    _die_if("after")


if __name__ == "__main__":
    os.replace = _replace
    sys.exit(main())

"""``selcon``: the entry point of the command line, which dispatches to the commands.

A command module is imported only when its command is called, so that the others are fast.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from selcon_plugin.engine.stopping import RunStopped

_USAGE = """\
usage: selcon COMMAND [ARGUMENTS]

  train     train without identity labels
  eval      evaluate a checkpoint
  bench     train and evaluate several configs over several seeds; write a table
  report    write an HTML report of a run, or compare several runs
  cluster   cluster a folder of images by pseudo identity
  adapt     fine-tune a network on a folder of images; keep the best checkpoint
            by a label-free criterion
  extract   write the features of a folder of images to a file
  index     build a searchable index of the features of many images
  search    find the person of a query image in an index
  export    write a trained network as ONNX or TorchScript
  config    explain a config key, or list all keys
  demo      render synthetic persons, train and evaluate in minutes on a CPU
  doctor    report what is installed, what works and how to fix the rest

`selcon COMMAND --help` lists the arguments of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        Exit status: 0; 2 for an error in arguments, config or data; 143 or 130 if SIGTERM
        or Ctrl-C ended the command; the commands document further ones.

    Raises:
        ValueError: If SELCON_TRACEBACK is set, errors are raised instead of printed; the
            same holds for the three below.
        FileNotFoundError: See above.
        ImportError: See above.
        FloatingPointError: See above.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _command("selcon_plugin.cli.train"),
        "eval": _command("selcon_plugin.cli.train", "evaluate"),
        "bench": _command("selcon_plugin.cli.bench"),
        "report": _command("selcon_plugin.cli.report"),
        "cluster": _command("selcon_plugin.cli.cluster"),
        "adapt": _command("selcon_plugin.cli.adapt"),
        "extract": _command("selcon_plugin.cli.extract"),
        "index": _command("selcon_plugin.cli.index"),
        "search": _command("selcon_plugin.cli.search"),
        "export": _command("selcon_plugin.cli.export"),
        "config": _command("selcon_plugin.cli.config"),
        "demo": _command("selcon_plugin.cli.demo"),
        "doctor": _command("selcon_plugin.cli.doctor"),
    }
    if not arguments or arguments[0] not in commands:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        stream = sys.stdout if asked_for_help else sys.stderr
        stream.write(_USAGE)
        return 0 if asked_for_help else 2
    try:
        return commands[arguments[0]](arguments[1:])
    except RunStopped as stop:  # which has logged how to resume
        return stop.code
    except KeyboardInterrupt:
        sys.stderr.write(f"selcon {arguments[0]}: interrupted\n")
        return 130
    except (ValueError, FileNotFoundError, ImportError, FloatingPointError) as error:
        # These are errors in the user's input. The message names the remedy, which a
        # traceback would hide. SELCON_TRACEBACK=1 shows where the error was raised.
        if os.environ.get("SELCON_TRACEBACK"):
            raise
        message = " ".join(line.strip() for line in str(error).splitlines())
        sys.stderr.write(f"selcon {arguments[0]}: error: {message}\n")
        return 2


def _command(module: str, function: str = "main") -> Callable[[list[str]], int]:
    """Return a function of a module that is imported when the function is called."""

    def run(argv: list[str]) -> int:
        status: int = getattr(importlib.import_module(module), function)(argv)
        return status

    return run

"""``selcon``: train, eval, bench, extract, config, demo and doctor from the command line.

The arguments of ``train`` and ``eval`` are those of FastReID's own train script. Nothing
algorithmic happens here: arguments are read, a config is made, a function is called.
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
  bench     train and evaluate several configs on several seeds; write a table
  report    write what a run learned as one page to look at; compare runs
  cluster   cluster a folder of images: who may be the same person
  adapt     train a network further on a folder of images, and keep what became better
  extract   write the features of a folder of images to a file
  index     keep the features of many images, to search in
  search    find the person of an image in an index
  export    write a trained network as ONNX or TorchScript
  config    say what a config key means, or list all keys
  demo      draw data, train and evaluate, in minutes, on a CPU
  doctor    say what is installed, what works and how to mend the rest

`selcon COMMAND --help` lists the arguments of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        Exit status: 0; 2 for a mistake in arguments, config or data; 143 or 130 for a
        command that SIGTERM or Ctrl-C ended; see the commands for others.

    Raises:
        ValueError: Mistakes are raised and not shown if SELCON_TRACEBACK is set; so are the
            next three.
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
        # Mistakes in what the user gave: the message says what to do, a traceback would
        # hide it. SELCON_TRACEBACK=1 shows where it was raised.
        if os.environ.get("SELCON_TRACEBACK"):
            raise
        message = " ".join(line.strip() for line in str(error).splitlines())
        sys.stderr.write(f"selcon {arguments[0]}: error: {message}\n")
        return 2


def _command(module: str, function: str = "main") -> Callable[[list[str]], int]:
    """Return a function of a module, which is imported when the function is called."""

    def run(argv: list[str]) -> int:
        status: int = getattr(importlib.import_module(module), function)(argv)
        return status

    return run

"""``selcon``: the entry point of the command line, which dispatches to the commands.

A command module is imported only when its command is called, so that the others are fast.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from functools import partial

from selcon_plugin.cli.failures import imported_command, run_command
from selcon_plugin.cli.parsing import CommandParser
from selcon_plugin.cli.versions import versions

_USAGE = """\
usage: selcon COMMAND [ARGUMENTS]

  train     train without identity labels
  eval      evaluate a checkpoint
  run       train with an unedited script of FastReID or torchreid, without labels
  bench     train and evaluate several configs over several seeds; write a table
  report    write an HTML report of a run, or compare several runs
  cluster   cluster a folder of images by pseudo identity
  adapt     fine-tune a network on a folder of images; keep the best checkpoint
            by a label-free criterion
  extract   write the features of a folder of images to a file
  index     build a searchable index of the features of many images
  search    find the person of a query image in an index
  export    write a trained network as ONNX, TorchScript or a plain host checkpoint
  config    explain a config key, list all keys, or copy a config of the package
  demo      render synthetic persons, train and evaluate in minutes on a CPU
  doctor    report what is installed, what works and how to fix the rest

`selcon COMMAND --help` lists the arguments of a command, `selcon --version` the versions.
"""

# Module and function of each command.
_COMMANDS = {
    "train": ("train", "main"),
    "eval": ("train", "evaluate"),
    **{
        name: (name, "main")
        for name in (
            *("run", "bench", "report", "cluster", "adapt", "extract", "index", "search"),
            *("export", "config", "demo", "doctor"),
        )
    },
}


def command_parsers() -> dict[str, CommandParser]:
    """Return the parser of each command by its name."""
    parsers = {}
    for name, (module, _) in _COMMANDS.items():
        found = importlib.import_module(f"selcon_plugin.cli.{module}")
        parsers[name] = found.train_parser(name) if module == "train" else found._parser()
    return parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        Exit status: 0; 2 for an error in arguments, config or data; 143 or 130 if SIGTERM
        or Ctrl-C ended the command; the commands document further ones.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in _COMMANDS:
        module, function = _COMMANDS[name]
        return run_command(name, imported_command(module, function, arguments[1:]))
    return run_command("", partial(_without_command, arguments))


def _without_command(arguments: list[str]) -> int:
    word = arguments[0] if arguments else ""
    if word in ("-h", "--help", "help"):
        sys.stdout.write(_USAGE)
        return 0
    if word in ("-V", "--version", "version"):
        sys.stdout.write(f"{versions()}\n")
        return 0
    if not word:
        sys.stderr.write(_USAGE)
        return 2
    close = difflib.get_close_matches(word.lower(), _COMMANDS, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"there is no command {word!r}: {hint}The commands are {', '.join(_COMMANDS)}"
    )

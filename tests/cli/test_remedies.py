"""Remedies in messages can be followed: their options, keys and commands exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import selcon_plugin
from helpers.hosts import needs_fastreid, needs_torchreid
from selcon_plugin.cli.main import _COMMANDS, command_parsers
from selcon_plugin.clustering import labeler_names, labeler_options
from selcon_plugin.clustering.remedies import fewer_outliers, more_clusters
from selcon_plugin.config.keys import clustering_options, own_method_options, run_options
from selcon_plugin.hosts import get_host
from selcon_plugin.methods import method_names
from selcon_plugin.renamed import OPTIONS

PACKAGE = Path(selcon_plugin.__file__).parent
# Options of other programs.
FOREIGN = {"--no-deps", "--index-url", "--extra-index-url"}
# Options of a command that is not finished.
PENDING = {"--torchreid", "--fastreid"}
# Capital names that are no keys.
WORDS = {
    "FASTREID_DATASETS", "CUDA_VISIBLE_DEVICES", "TORCH_HOME", "HF_HOME", "LOCAL_RANK",
    "WORLD_SIZE", "SHA_256", "SELCON_TRACEBACK", "SELCON_VERBOSE",
    "SELCON_READ_TIMEOUT", "XDG_CACHE_HOME",
}  # fmt: skip


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each message: of errors, warnings and lines."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call = node.exc
            elif isinstance(node, ast.Call) and _is_message(node.func):
                call = node
            else:
                continue
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}", _text(call)


def _is_message(function: ast.expr) -> bool:
    name = getattr(function, "attr", getattr(function, "id", ""))
    return name in ("warning", "info", "error", "echo", "Note", "write")


def _text(call: ast.Call) -> str:
    constants = (node for argument in call.args for node in ast.walk(argument))
    return " ".join(
        node.value
        for node in constants
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


MESSAGES = list(messages())


def options_of_commands() -> set[str]:
    return {
        option
        for parser in command_parsers().values()
        for option in parser._option_string_actions
    } | {"--version"}


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 300


def test_options_exist() -> None:
    known = options_of_commands() | FOREIGN | PENDING
    for place, text in MESSAGES:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text):
            assert option in known, f"{place} names {option}: {text}"


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_options_that_a_command_names_are_its_own(name: str) -> None:
    module, _ = _COMMANDS[name]
    known = set(command_parsers()[name]._option_string_actions) | FOREIGN
    if module == "train":
        known |= {"--host"}
    for place, text in MESSAGES:
        if place.startswith(f"cli/{module}.py:"):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text):
                assert option in known, f"{place} names {option}: {text}"


def test_unreadable_images_have_their_option_in_every_command_that_reads_folders() -> None:
    for name, parser in command_parsers().items():
        if "--camera-pattern" in parser._option_string_actions:
            assert "--max-unreadable-ratio" in parser._option_string_actions, name


def test_commands_exist() -> None:
    for place, text in MESSAGES:
        for command in re.findall(r"\bselcon ([a-z]+)\b", text):
            assert command in _COMMANDS, f"{place} names selcon {command}: {text}"


@needs_fastreid
@needs_torchreid
def test_keys_exist() -> None:
    known: set[str] = set()
    for host in ("fastreid", "torchreid"):
        for key in get_host(host).help().defaults:
            parts = key.split(".")
            known |= {".".join(parts[: length + 1]) for length in range(len(parts))}
    heads = {key.partition(".")[0] for key in known}
    for place, text in MESSAGES:
        for key in re.findall(r"\b[A-Z][A-Z_]+(?:\.[A-Z][A-Z_]+)+\b", text):
            assert key in known, f"{place} names {key}: {text}"
        for key in re.findall(r"\b[a-z_]+\.[a-z_]+(?:\.[a-z_]+)*\b", text):
            if key.partition(".")[0] in heads - {"data", "model", "test"}:
                assert key in known, f"{place} names {key}: {text}"


def test_options_of_runs_exist() -> None:
    known = {*run_options(), *clustering_options(), *OPTIONS}
    for name in method_names():
        known |= own_method_options(name).keys()
    for name in labeler_names():
        known |= labeler_options(name).keys()
    upper = {name.upper() for name in known} | WORDS
    hosts: set[str] = set()
    for host in ("fastreid",):
        hosts |= {part for key in get_host(host).help().defaults for part in key.split(".")}
    for place, text in MESSAGES:
        for word in re.findall(r"(?<![\w.])[A-Z]+(?:_[A-Z]+)+\b", text):
            assert word in upper | hosts, f"{place} names {word}: {text}"


@pytest.mark.parametrize("name", labeler_names())
def test_remedies_name_options_of_the_labeler(name: str) -> None:
    options = labeler_options(name)
    for remedy in (more_clusters(options), fewer_outliers(options)):
        named = re.findall(r"(?:lower|raise|set) (\w+)", remedy)
        assert named, remedy
        assert set(named) <= options.keys(), remedy
        if "auto" in remedy:
            assert "auto" in options["eps"].special_values

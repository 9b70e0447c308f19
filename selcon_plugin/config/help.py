"""Documentation of config keys, for ``selcon config`` and for configs/README.md."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from selcon_plugin.clustering import labeler_names, labeler_options
from selcon_plugin.config.keys import ConfigKeys, clustering_options, own_method_options
from selcon_plugin.methods import method_class, method_names
from selcon_plugin.options import Choice, Option
from selcon_plugin.values import listed

_HEADER = "| key | default | legal | meaning |\n| --- | --- | --- | --- |"
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")  # [title](address)
_EMPHASIS = re.compile(r"\*\*([^*]+)\*\*")
_EVERY = ""  # owner of keys that do not belong to a single method or labeler


@dataclass(frozen=True)
class KeyHelp:
    """Documentation of one config key.

    Attributes:
        key: Full key.
        kind: ``"method"`` or ``"labeler"`` for a key of only some of these, else ``""``.
        options: Option of the key, by the name of the method or labeler.
    """

    key: str
    kind: str
    options: Mapping[str, Option]

    @property
    def owners(self) -> list[str]:
        """Methods or labelers with this key; empty for a key of every run."""
        return [name for name in self.options if name != _EVERY]

    def example(self) -> Any:
        """Return a valid value, which differs from the default where there is a choice."""
        option = next(iter(self.options.values()))
        if option.kind is bool:
            return not option.default
        if isinstance(option.legal, Choice):
            others = [value for value in option.legal.values if value != option.default]
            return others[0] if others else option.default
        return option.default


@dataclass(frozen=True)
class ConfigHelp:
    """Documentation of the keys of a host's config that the plugin adds or checks.

    Attributes:
        keys: Keys of the plugin.
        host: Name of the host.
        defaults: All keys of the host's config, including the plugin's, with defaults.
        own: Full keys outside the plugin's node that the plugin adds.
        checked: Full keys of the host that the plugin checks.
    """

    keys: ConfigKeys
    host: str
    defaults: Mapping[str, Any]
    own: Sequence[Option] = ()
    checked: Sequence[Option] = ()
    plugin_keys: Mapping[str, KeyHelp] = field(init=False)

    def __post_init__(self) -> None:
        found = _plugin_keys(self.keys)
        found |= {o.name: KeyHelp(o.name, "", {_EVERY: o}) for o in self.own}
        object.__setattr__(self, "plugin_keys", found)

    def find(self, text: str) -> str:
        """Find a full key by its name or its end.

        Args:
            text: Full key, or the end of one, in any case: ``temperature``.

        Returns:
            The full key of the host.

        Raises:
            ValueError: If no key or several keys match; the message names similar keys.
        """
        if not text.strip(". "):
            raise ValueError(
                f"no key is named, got {text!r}: give one, such as temperature; selcon "
                "config --list shows all"
            )
        text = self.keys.present_key(text)
        if text in self.defaults:
            return text
        end = f".{text.lower()}"
        for known in (self.plugin_keys, self.defaults):
            found = [key for key in known if f".{key.lower()}".endswith(end)]
            if len(found) > 1:
                raise ValueError(f"{text} may be {' or '.join(found)}: give the full key")
            if found:
                return found[0]
        inside = [
            key for key in self.defaults if key.lower().startswith(f"{text.lower()}.")
        ]
        if inside:
            raise ValueError(f"{text} is a group of keys: {listed(inside)}")
        raise ValueError(f"{self.host}'s config has no key {text}{self._hint(text)}")

    def _hint(self, text: str) -> str:
        by_end = {key.lower(): key for key in [*self.defaults, *self.plugin_keys]}
        by_end |= {key.lower().rpartition(".")[2]: key for key in self.plugin_keys}
        close = difflib.get_close_matches(text.lower(), by_end, n=3, cutoff=0.6)
        found = list(dict.fromkeys(by_end[end] for end in close))
        return f"; did you mean {' or '.join(found)}?" if found else ""

    def explain(self, key: str) -> str:
        """Explain a key: meaning, valid values, default, owners and how to set it.

        Args:
            key: Full key of the host.

        Returns:
            Lines of text.
        """
        if key in self.plugin_keys:
            found = self.plugin_keys[key]
            return "\n".join([key, "", *_explained(found), *self._usage(found)])
        lines = [key, "", *_wrapped(f"This is a key of {self.host} itself.")]
        for option in self.checked:
            if option.name == key:
                lines += _wrapped(_sentence(option.meaning))
                lines += _wrapped(f"Legal: {option.describe()}")
        return "\n".join([*lines, *_wrapped(f"Default: {_written(self.defaults[key])}")])

    def _usage(self, found: KeyHelp) -> list[str]:
        value = _written(found.example())
        setting = [f"{found.key} {value}"]
        owners = found.owners
        if owners:
            plural = "s" if len(owners) > 1 else ""
            of = _wrapped(f"It belongs to the {found.kind}{plural} {', '.join(owners)}.")
            node = found.key.rpartition(".")[0]
            setting.insert(0, f"{node}.{self.keys.case(found.kind)} {owners[0]}")
        else:
            of = _wrapped("It belongs to every run.")
        tree = yaml.safe_dump(_nested(found.key, found.example()), sort_keys=False)
        return [
            "",
            *of,
            "",
            "  In a config file:",
            *(f"    {line}" for line in tree.splitlines()),
            "  On the command line:",
            f"    selcon train --config-file FILE {' '.join(setting)}",
        ]

    def listing(self) -> str:
        """List the plugin's keys, one per line, with default and meaning.

        Returns:
            Lines of text, in groups.
        """
        groups: dict[str, list[KeyHelp]] = {}
        for found in self.plugin_keys.values():
            groups.setdefault(_group_title(found), []).append(found)
        width = max(len(key) for key in self.plugin_keys)
        lines = []
        for title, members in groups.items():
            lines += ["", title]
            for found in members:
                first = next(iter(found.options.values()))
                same = {str(option.default) for option in found.options.values()}
                default = _written(first.default) if len(same) == 1 else "differs"
                meaning = _plain(first.meaning).partition(". ")[0]
                lines.append(f"  {found.key:{width}}  {default:9}  {meaning}")
        return "\n".join(lines[1:])

    def tables(self) -> dict[str, str]:
        """Build the tables of all keys.

        Returns:
            Markdown by the name of the table: ``run``, ``clustering``, ``other``, and one
            for each method and labeler, such as ``method CAP``.
        """
        case = self.keys.case
        run, clustering = self.keys.run_options(), clustering_options()
        tables = {
            "run": key_table(run.values(), case),
            "clustering": key_table(clustering.values(), case),
            "other": key_table(self.own),
        }
        for name in labeler_names():
            tables[f"labeler {name}"] = key_table(labeler_options(name).values(), case)
        for name in method_names():
            tables[f"method {name}"] = _method_table(name, case)
        return tables


def _plugin_keys(keys: ConfigKeys) -> dict[str, KeyHelp]:
    found: dict[str, KeyHelp] = {}
    clustering = f"{keys.path}.{keys.clustering_key}"

    def add(node: str, kind: str, owner: str, options: Iterable[Option]) -> None:
        for option in options:
            key = f"{node}.{keys.case(option.name)}"
            known = found[key].options if key in found else {}
            found[key] = KeyHelp(key, kind, {**known, owner: option})

    add(keys.path, "", _EVERY, keys.run_options().values())
    for name in method_names():
        add(keys.path, "method", name, own_method_options(name).values())
    add(clustering, "", _EVERY, clustering_options().values())
    for name in labeler_names():
        add(clustering, "labeler", name, labeler_options(name).values())
    return found


def _group_title(found: KeyHelp) -> str:
    if found.kind:
        return f"Keys of single {found.kind}s"
    return f"{found.key.rpartition('.')[0]}: keys of every run"


def _explained(found: KeyHelp) -> list[str]:
    """Describe the meaning and the valid values of a key."""
    return [
        *_grouped("", found.options, lambda option: _sentence(option.meaning)),
        "",
        *_grouped("Legal: ", found.options, lambda option: option.describe()),
        *_grouped("Default: ", found.options, lambda option: _written(option.default)),
    ]


def _grouped(
    title: str, options: Mapping[str, Option], describe: Callable[[Option], str]
) -> list[str]:
    """Return one line per distinct description, with the names it belongs to."""
    groups: dict[str, list[str]] = {}
    for owner, option in options.items():
        groups.setdefault(describe(option), []).append(owner)
    lines = []
    ordered = sorted(groups, key=lambda text: len(groups[text]))
    for text in ordered:
        owners = ", ".join(groups[text])
        if text == ordered[-1] and len(groups[text]) > 2:
            owners = "the others"
        lines += _wrapped(f"{title}{text}" + (f" ({owners})" if len(groups) > 1 else ""))
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 88, initial_indent="  ", subsequent_indent="    ", break_long_words=False
    )


def _plain(markdown: str) -> str:
    """Return text for a terminal: without marks, and with the titles of links only."""
    return _EMPHASIS.sub(r"\1", _LINK.sub(r"\1", markdown.replace("`", "")))


def _sentence(meaning: str) -> str:
    text = _plain(meaning)
    # A symbol keeps its case: "τ, divides ...".
    starts_with_word = text[:1].isascii() and text[1:2].islower()
    return f"{text[:1].upper() + text[1:] if starts_with_word else text}."


def _written(value: Any) -> str:
    """Format a value for the command line."""
    return value if isinstance(value, str) and value else repr(value)


def _nested(key: str, value: Any) -> Any:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _method_table(name: str, case: Callable[[str], str]) -> str:
    """Build the table of a method, which lists only differences from its base method."""
    options = own_method_options(name)
    registered = {method_class(other): other for other in method_names() if other != name}
    bases = [registered[cls] for cls in method_class(name).__mro__ if cls in registered]
    if not bases:
        return key_table(options.values(), case)
    known = own_method_options(bases[0])
    rest = [
        option
        for key, option in options.items()
        if known.get(key) != option or known[key].meaning != option.meaning
    ]
    if not rest:
        return f"Has the keys of `{bases[0]}`."
    return f"Has all keys of `{bases[0]}`; these differ:\n\n{key_table(rest, case)}"


def key_table(options: Iterable[Option], case: Callable[[str], str] = str) -> str:
    """Build a table of keys.

    Args:
        options: Options of the keys.
        case: Converts an option's name to a key.

    Returns:
        Markdown table with key, default, valid values and meaning.
    """
    rows = [
        f"| `{case(o.name)}` | {_cell(o.default)} | {_legal(o)} | {o.meaning} |"
        for o in options
    ]
    return "\n".join([_HEADER, *rows])


def _cell(value: Any) -> str:
    return '""' if value == "" else str(value)


def _legal(option: Option) -> str:
    # The names of all methods would only list the tables below.
    return (
        "a name below" if option.name in ("method", "labeler") else option.describe_legal()
    )


def fill_tables(text: str, tables: Mapping[str, str]) -> str:
    """Insert tables between their markers.

    A table is placed between ``<!-- keys: NAME -->`` and ``<!-- keys: end -->``.

    Args:
        text: Markdown with a marker for each table.
        tables: Markdown by name.

    Returns:
        The text with new tables.

    Raises:
        ValueError: If a table has no marker, or a marker has no table.
    """
    end = "<!-- keys: end -->"
    for name, table in tables.items():
        begin = f"<!-- keys: {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(
                f"there is no place for the table {name!r}: add a heading, followed by the "
                f"lines {begin} and {end}"
            )
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    known = {f"<!-- keys: {name} -->" for name in [*tables, "end"]}
    for line in text.splitlines():
        if line.startswith("<!-- keys: ") and line not in known:
            raise ValueError(f"there is no table for {line}: remove the line")
    return text

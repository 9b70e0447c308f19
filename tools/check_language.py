"""Refuse phrases that the field does not use, and name its term for each.

    python tools/check_language.py              # every file that git tracks
    python tools/check_language.py docs README.md
    python tools/check_language.py --count      # how often each phrase occurs

The phrases are in ``tools/retired_phrases.yml``; ``docs/glossary.md`` explains the terms.
"""

from __future__ import annotations

import argparse
import bisect
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PHRASES = Path(__file__).with_name("retired_phrases.yml")
_TEXT = (".md", ".py", ".yml", ".yaml", ".toml", ".txt", ".svg")
SUFFIXES = (*_TEXT, ".css", ".js", ".j2", ".html")
NAMES = ("Makefile", "run")

# Files that name the retired phrases on purpose, or whose text is not ours.
EXEMPT = (
    "CHANGELOG.md",  # old entries stay as they were released; renamed keys are listed there
    "LICENSE",
    "docs/changelog.md",
    "requirements/constraints.txt",
    "selcon_plugin/_moved.py",  # former names, which still load
    "selcon_plugin/renamed.py",
    "tests/config/test_renamed.py",
    "tests/fastreid_ext/test_config.py",
    "tests/test_moved.py",
    "tests/test_old_runs.py",
    "tests/tools/test_check_language.py",
    "tests/torchreid_ext/test_config.py",
    "tools/check_language.py",
    "tools/retired_phrases.yml",
)

OLD_RUNS = "tests/old_runs/"  # files that earlier versions have written

# A space may be a line break, with the comment mark of the next line, or part of a name.
_GAP = r"(?:[ \t_-]|[ \t]*\"?\n[ \t]*(?:\#+:?|//|\*|>|f?\")?[ \t]*)"
_EXCUSED = re.compile(r"allow-phrase \([^)]+\)")
# A summary line is a statement: it names a thing, or says what a function does.
_QUESTION = re.compile(
    r'"""(?:From which|How|Who|Whose|What|Which|Where|When|Why|Whether'
    r"|Has|Have|Is|Are|Does|Do)"
    r"(?![A-Za-z-])"
)


@dataclass(frozen=True)
class Phrase:
    """A phrase to refuse.

    Attributes:
        pattern: What is searched for.
        term: The field's term.
        allowed: Contexts in which the phrase is legitimate.
    """

    pattern: re.Pattern[str]
    term: str
    allowed: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> Phrase:
        """Build a phrase from its entry in the data file.

        Args:
            entry: ``phrase``, ``term`` and optionally ``allow``, reasons by pattern.

        Returns:
            The phrase.

        Raises:
            ValueError: If a reason is missing, or a key is unknown.
        """
        unknown = set(entry) - {"phrase", "term", "allow"}
        allow = entry.get("allow", {})
        if unknown or not all(allow.values()):
            raise ValueError(f"{entry}: expected phrase, term and allow with a reason each")
        text = entry["phrase"].strip().replace(" ", _GAP)
        pattern = rf"(?<![A-Za-z])(?:{text})(?![A-Za-z])"
        allowed = tuple(re.compile(key, re.IGNORECASE) for key in allow)
        return cls(re.compile(pattern, re.IGNORECASE), entry["term"], allowed)


@dataclass(frozen=True)
class Finding:
    """A retired phrase in a file: 1-based line, the text found, and the field's term."""

    file: str
    line: int
    found: str
    term: str

    def __str__(self) -> str:
        """Return one line, as compilers print it."""
        return f"{self.file}:{self.line}: {self.found!r}; the term is: {self.term}"


def load_phrases(file: Path = PHRASES) -> list[Phrase]:
    """Return the retired phrases of a data file."""
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [Phrase.parse(entry) for entry in entries]


def check_text(text: str, file: str, phrases: Iterable[Phrase]) -> Iterator[Finding]:
    """Search one text.

    Args:
        text: Contents of a file.
        file: Its name, for the findings; summaries of docstrings are checked in ``.py``.
        phrases: The retired phrases.

    Yields:
        One finding per occurrence that no rule allows.
    """
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    lines = text.split("\n")

    def position(match: re.Match[str]) -> int:
        return bisect.bisect_right(starts, match.start())

    for phrase in phrases:
        for match in phrase.pattern.finditer(text):
            number = position(match)
            line, start = lines[number - 1], match.start() - starts[number - 1]
            stop = min(start + len(match[0]), len(line))
            if not _is_allowed(line, start, stop, phrase.allowed):
                yield Finding(file, number, re.sub(r"\s+", " ", match[0]), phrase.term)
    if file.endswith(".py"):
        for match in _QUESTION.finditer(text):
            yield Finding(file, position(match), match[0], "a declarative summary line")


def _is_allowed(
    line: str, start: int, stop: int, allowed: Iterable[re.Pattern[str]]
) -> bool:
    if _EXCUSED.search(line):
        return True
    return any(
        found.start() <= start and stop <= found.end()
        for pattern in allowed
        for found in pattern.finditer(line)
    )


def tracked_files(root: Path, below: Iterable[str] = ()) -> list[Path]:
    """Return the files that git tracks or would track, without ignored ones and links."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--"]
    done = subprocess.run(
        [*command, *below], cwd=root, capture_output=True, text=True, check=True
    )
    files = (root / name for name in sorted(set(done.stdout.splitlines())))
    return [file for file in files if file.is_file() and not file.is_symlink()]


def check_files(root: Path, files: Iterable[Path], phrases: list[Phrase]) -> list[Finding]:
    """Search the readable files among ``files``; names are given relative to ``root``."""
    findings: list[Finding] = []
    for file in files:
        name = file.relative_to(root).as_posix()
        if (
            name in EXEMPT
            or name.startswith(OLD_RUNS)
            or not (file.suffix in SUFFIXES or file.name in NAMES)
        ):
            continue
        findings += check_text(file.read_text(encoding="utf-8"), name, phrases)
    return sorted(findings, key=lambda found: (found.file, found.line))


def main(argv: list[str] | None = None) -> int:
    """Print the findings; the status is 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="files and folders below the root")
    parser.add_argument("--count", action="store_true", help="print counts, not lines")
    args = parser.parse_args(argv)
    findings = check_files(ROOT, tracked_files(ROOT, args.paths), load_phrases())
    if args.count:
        by_term = Counter((found.found.lower(), found.term) for found in findings)
        for (text, term), count in by_term.most_common():
            print(f"{count:5d}  {text}  ->  {term}")
    else:
        for found in findings:
            print(found)
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())

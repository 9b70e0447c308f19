"""Reading of a host's data sets, whose files may be absent, misnamed or have odd lines.

The hosts' data sets parse names of files and lines of lists without a check: a blank line
ends in a traceback, a file ``cover.jpg`` as well, and a folder named ``0001_c3`` above the
images is taken for person and camera of all of them. While :class:`DatasetReading` is
active, the modules of a data set see

* ``open``: lines of text without blank lines, byte order mark, and superfluous spaces;
* ``re``: patterns that search the name of a file, not the folders above it;
* ``glob``: the same files, and image files that the pattern leaves out are counted.

An error names the data set with the file, and the line if there is one.
"""

from __future__ import annotations

import builtins
import contextlib
import glob
import io
import logging
import os
import re
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selcon_plugin.datasets.folder_files import IMAGE_SUFFIXES
from selcon_plugin.io.responses import close_responses

logger = logging.getLogger(__name__)

_MISSING = object()
# Attribute that the hosts' data sets have, in contrast to other objects with methods.
_CHECK = "check_before_run"
_PACKAGE = "selcon_plugin."
_reported: set[tuple[str, str]] = set()  # patterns whose remaining files were reported


class DatasetFileError(ValueError):
    """Error for files that do not have the format of their data set."""


class DatasetReading:
    """Context in which a host's data set is read.

    Args:
        name: Name of the data set.
        place: Description of the folder that contains it, for error messages.
        remedy: Advice if files are absent, as a sentence without a full stop.
        classes: Classes of the data set, or functions that build it.

    Raises:
        FileNotFoundError: On leaving, if files of the data set are absent.
        ValueError: On leaving, if a file has a wrong name or content.
    """

    def __init__(self, name: str, place: str, remedy: str, classes: Iterable[Any]) -> None:
        self._name, self._place, self._remedy = name, place, remedy
        self._modules = list(_modules_of(classes))
        self._opened: dict[str, dict[str, int]] = {}  # number of each line, by file
        self._saved: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> DatasetReading:
        replacements = {
            "open": self._open,
            "re": _Patterns(),
            "glob": _Glob(self._name),
        }
        for space in self._modules:
            for name, value in replacements.items():
                present = space.get(name, _MISSING)
                if name == "open" or present is not _MISSING:
                    self._saved.append((space, name, present))
                    is_function = callable(present) and name == "glob"
                    space[name] = value.glob if is_function else value  # type: ignore[attr-defined]
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for space, name, value in reversed(self._saved):
            if value is _MISSING:
                del space[name]
            else:
                space[name] = value
        self._saved = []
        if error is not None:
            close_responses(error)  # torchreid downloads some data sets
        explained = self._explained(error) if isinstance(error, Exception) else None
        if explained is not None:
            raise explained from error

    def check_images(self, split: str, paths: Sequence[str]) -> None:
        """Refuse a split without training images, or with images of another place.

        Args:
            split: Name of the split.
            paths: Its images.

        Raises:
            DatasetFileError: If there are none to train on.
            FileNotFoundError: If the folder of the first one does not exist.
        """
        if not paths and split == "train":
            raise DatasetFileError("it has no images in train")
        if paths and not Path(paths[0]).parent.is_dir():
            raise FileNotFoundError(
                f"its lists name images in a folder that does not exist, first {paths[0]}. "
                "Lists with full paths, such as splits_*.json of CUHK03, are written again "
                "if they are removed"
            )

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) - {"r", "t"}:
            return builtins.open(file, mode, *args, **kwargs)
        text = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")
        lines: dict[str, int] = {}
        kept = []
        for number, line in enumerate(text.splitlines(), start=1):
            line = " ".join(line.split())
            if line:
                kept.append(line)
                lines.setdefault(line, number)
        self._opened[os.fspath(file)] = lines
        return io.StringIO("".join(f"{line}\n" for line in kept))

    # --- errors ---------------------------------------------------------------------------

    def _explained(self, error: Exception) -> Exception | None:
        """Return the error to raise instead; None to raise the error itself."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        raised_in = str(frames[-1].f_globals.get("__name__"))
        if raised_in.startswith(_PACKAGE) and raised_in != __name__:
            return None  # an error of this package has its own remedy
        own = [i for i, frame in enumerate(frames) if _is_of_dataset(frame)]
        last = frames[own[-1]] if own else None
        name = type(last.f_locals["self"]).__name__ if last else self._name
        text = f"the data set {name} ({self._place}) "
        if last is not None and last.f_code.co_name == "download_dataset":
            folder = last.f_locals["dataset_dir"]
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # torchreid creates it before it downloads
            where = f"{folder} does not exist"
            what = f"{where}, and it cannot be downloaded ({_described(error, frames)})"
            return FileNotFoundError(f"{text}is absent: {what}. {self._remedy}")
        what = str(error) if raised_in == __name__ else self._place_of(error, frames, own)
        if _is_absent(error):
            return FileNotFoundError(f"{text}is not complete: {what}. {self._remedy}")
        return ValueError(f"{text}cannot be read: {what}")

    def _place_of(
        self, error: Exception, frames: list[types.FrameType], own: list[int]
    ) -> str:
        """Describe an error with the file, and the line, that caused it."""
        what = _described(error, frames)
        for frame in reversed(frames[own[-1] :] if own else []):
            found = self._named_in(frame.f_locals)
            if found:
                return f"{found}: {what}. Correct or remove it"
        return what

    def _named_in(self, values: Mapping[str, Any]) -> str:
        texts = [value for value in values.values() if isinstance(value, str)]
        for file, lines in reversed(self._opened.items()):
            for text in texts:
                line = " ".join(text.split())
                if line in lines:
                    return f"{file}, line {lines[line]}, {line!r}"
        files = [text for text in texts if os.path.isfile(text)]
        return files[-1] if files else ""


def _modules_of(classes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield the global names of the modules that define classes and their bases."""
    seen: set[int] = set()
    for given in classes:
        cls = getattr(given, "func", given)  # a partial call of a class
        for part in getattr(cls, "__mro__", (cls,)):
            function = vars(part).get("__init__", part) if isinstance(part, type) else part
            space = getattr(function, "__globals__", None)
            if space is not None and id(space) not in seen:
                seen.add(id(space))
                yield space


def _is_of_dataset(frame: types.FrameType) -> bool:
    return hasattr(frame.f_locals.get("self"), _CHECK)


def _is_absent(error: Exception) -> bool:
    if isinstance(error, AssertionError):
        return "not found" in str(error).lower()
    return isinstance(error, (OSError, ImportError, RuntimeError))


def _described(error: Exception, frames: list[types.FrameType]) -> str:
    """Describe an error in one line; a failed check by its source and its values."""
    text, values = " ".join(str(error).split()), frames[-1].f_locals
    if isinstance(error, AssertionError):
        versions = frames[-1].f_globals.get("VERSION_DICT")  # of MSMT17
        if text and versions:
            return f"{text}: there is none of the folders {', '.join(versions)}"
        return text or _failed_check(error, values)
    empty = [n for n in ("train", "query", "gallery") if values.get(n) == []]
    if isinstance(error, IndexError) and empty:
        return f"it has no images in {', '.join(empty)}"
    if isinstance(error, (RuntimeError, OSError)):
        return text
    return f"{type(error).__name__}: {text}"


def _failed_check(error: AssertionError, values: Mapping[str, Any]) -> str:
    source = traceback.extract_tb(error.__traceback__)[-1].line or "a check"
    names = dict.fromkeys(re.findall(r"\b[a-z_]+\b", source))
    known = [f"{name} = {values[name]!r}" for name in names if name in values]
    condition = source.removeprefix("assert ").partition("#")[0].strip()
    return f"it does not fulfill {condition} ({', '.join(known)})"


class _Glob(types.ModuleType):
    """The module ``glob``, which reports image files that a pattern leaves out."""

    def __init__(self, dataset: str) -> None:
        super().__init__("glob")
        vars(self).update({n: v for n, v in vars(glob).items() if not n.startswith("__")})
        self._dataset = dataset
        self.glob: Callable[..., list[str]] = self._glob

    def _glob(self, pattern: str, **options: Any) -> list[str]:
        found = glob.glob(pattern, **options)
        folder, name = os.path.split(pattern)
        if name.startswith("*.") and (self._dataset, pattern) not in _reported:
            _reported.add((self._dataset, pattern))
            self._report(folder, name, {os.path.basename(path) for path in found})
        return found

    def _report(self, folder: str, name: str, found: set[str]) -> None:
        if not os.path.isdir(folder):
            return
        others = sorted(
            file
            for file in os.listdir(folder)
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and file not in found
        )
        if others:
            logger.warning(
                "%d image files in %s are left out, because the data set %s reads %s "
                "only, for instance %s",
                len(others),
                folder,
                self._dataset,
                name,
                others[0],
            )


class _Patterns(types.ModuleType):
    """The module ``re``, whose patterns search the name of a file and must match it."""

    def __init__(self) -> None:
        super().__init__("re")
        vars(self).update({n: v for n, v in vars(re).items() if not n.startswith("__")})
        self.compile: Callable[..., Any] = _NamePattern


class _NamePattern:
    """A compiled pattern for names of files."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._pattern = re.compile(pattern, flags)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pattern, name)

    def search(self, text: str, *args: int) -> re.Match[str] | None:
        """Search the last part of a path."""
        folder, name = os.path.split(text)
        if not folder or "/" in self._pattern.pattern:
            return self._pattern.search(text, *args)
        match = self._pattern.search(name)
        if match is None:
            raise DatasetFileError(self._explained(folder, name))
        return match

    def _explained(self, folder: str, name: str) -> str:
        suffix = os.path.splitext(name)[1]
        wrong = [
            other
            for other in sorted(os.listdir(folder))
            if other.endswith(suffix) and not self._pattern.search(other)
        ]
        more = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        return (
            f"{folder} contains {wrong[0] if wrong else name}{more}, which does not have a "
            f"name like its other images (pattern {self._pattern.pattern}). Move such "
            "files to another folder, or rename them"
        )

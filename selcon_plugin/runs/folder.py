"""The folder of a training run: its owner, its identity, and files of an earlier run.

A run owns its folder while it works. A new run is refused where there is another one, or
moves that one's files aside; only then it writes its first file. Its identity is written to
``run.json`` and to its metrics, so that two runs are never mixed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from selcon_plugin.distributed import on_main_process, rank
from selcon_plugin.io.atomic import (
    make_folder,
    remove_partial_files,
    write_atomically,
)
from selcon_plugin.io.integrity import DamagedFileError, sealed_json, unsealed_json
from selcon_plugin.io.locks import owned_folder
from selcon_plugin.runs.metrics import METRICS_FILE, begin_metrics, end_last_line
from selcon_plugin.runs.results import delete_results
from selcon_plugin.runs.settings import flat_settings

__all__ = [
    "CONFIG_FILE",
    "RUN_FILE",
    "RunExistsError",
    "RunFolder",
    "owned_run",
    "written_settings",
]

logger = logging.getLogger(__name__)

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
# What nobody can train again in a moment. A folder with one of these holds a run.
_BEST = ("best_without_labels.pth", "model/best_without_labels.pth")
_RESULTS = (
    *("results.json", "model_*.pth", "model/model.pth.tar-*", "model/model-*.pth.tar"),
    *_BEST,
)
# All files of a run; those of the host's log are continued.
_FILES = (
    *(RUN_FILE, METRICS_FILE, "images.json", "embedding.npz", "ranked.json"),
    *("report.html", "last_checkpoint", "events.out.tfevents.*"),
)
_ASIDE = "old-{}"


class RunExistsError(ValueError):
    """Error for a folder that holds another run; the message names the remedies."""


# How often this thread owns each folder.
_owned: dict[tuple[str, int], int] = {}


@contextlib.contextmanager
def owned_run(folder: str | Path) -> Iterator[None]:
    """Own the folder of a run; the processes of one run share it.

    The same thread may own a folder several times. A folder that was created for this is
    removed if it is still empty at the end.

    Args:
        folder: Folder of the run; nothing is owned if it is empty.

    Yields:
        Nothing.

    Raises:
        InUseError: If another run owns it, on every process of this run.
        OSError: If the folder cannot be written.
    """  # noqa: DOC502  (raised by the functions called here)
    key = os.path.realpath(folder), threading.get_ident()
    if not str(folder) or _owned.get(key):
        yield
        return
    existed = Path(folder).is_dir()
    with contextlib.ExitStack() as stack:
        on_main_process(lambda: stack.enter_context(owned_folder(folder)))
        _owned[key] = 1
        try:
            yield
        finally:
            del _owned[key]
            stack.close()
            if not existed and rank() == 0:
                with contextlib.suppress(OSError):  # it is not empty
                    Path(folder).rmdir()


class RunFolder:
    """Folder of one training run.

    Args:
        path: Path of the folder; empty for a run that writes no file.
        overwrite: Whether a new run may move an earlier one's files aside.

    Attributes:
        identity: Identity of the run; empty before it begins.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path) if str(path) else None
        self._overwrite = overwrite
        self._resumes = False
        self._last, self._config = "", ""
        self.identity = ""

    @property
    def holds_run(self) -> bool:
        """Return whether there are results or checkpoints of an earlier run."""
        return bool(self._results())

    def resume_from_start(self) -> None:
        """Let a run that is to resume start over, as it has no checkpoint yet.

        The best weights of its first epochs are moved aside then.
        """
        self._resumes = True

    def check_new(self) -> None:
        """Refuse to begin a new run where another one is.

        Raises:
            RunExistsError: If there is one, and it must not be overwritten.
        """
        found = [] if self._overwrite else self._results()
        if found:
            self.restore_config()
            some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise RunExistsError(
                f"{self.path} holds a run ({some}). Continue it with --resume (in Python "
                "resume=True), choose another output folder, or start over with "
                f"--overwrite (overwrite=True), which moves its files to "
                f"{self.path}/{_ASIDE.format('...')}"
            )

    def restore_config(self) -> None:
        """Write the config of the run in the folder again, if it is another one now.

        FastReID's scripts write their config before the trainer can refuse it.
        """
        text = self._content().get("config")
        if self.path is None or not isinstance(text, str) or not text:
            return
        file = self.path / CONFIG_FILE
        if not file.is_file() or file.read_bytes() != text.encode():
            write_atomically(text, file)

    @contextlib.contextmanager
    def running(self, *, resumed: bool, config: str = "") -> Iterator[None]:
        """Own the folder while the run trains; begin a new run in it, or continue its own.

        Args:
            resumed: Whether the run continues from a checkpoint in the folder.
            config: Text of ``config.yaml``; empty to write none.

        Yields:
            Nothing.

        Raises:
            InUseError: If another run owns the folder.
            RunExistsError: If a new run would begin where another one is.
        """  # noqa: DOC502  (raised by the functions called here)
        if self.path is None:
            yield
            return
        with owned_run(self.path):
            on_main_process(lambda: self._start(resumed, config))
            yield

    def _start(self, resumed: bool, config: str) -> None:
        assert self.path is not None
        if not resumed:
            self.check_new()
        self._config = config
        for folder in (self.path, self.path / "model"):
            remove_partial_files(folder)
        if resumed:
            self.identity = self.recorded_identity or _new_identity()
            self._last = self.last
            self._record()
            end_last_line(self.path)
            delete_results(self.path)  # those of a shorter training
        else:
            self._begin()
        if config:
            write_atomically(config, self.path / CONFIG_FILE)

    def _begin(self) -> None:
        """Begin a new run; a kill at any time leaves none that could be taken for it."""
        assert self.path is not None
        self.identity, self._last = _new_identity(), ""
        old = self._files()
        # From here on what is there belongs to no run.
        self._record(beginning=True)
        if old:
            self._move_aside(old)
        begin_metrics(self.path, self.identity)
        self._record()

    def _move_aside(self, files: list[Path]) -> None:
        assert self.path is not None
        name = _ASIDE.format(time.strftime("%Y%m%d-%H%M%S"))
        target, number = self.path / name, 1
        while target.exists():
            number += 1
            target = self.path / f"{name}-{number}"
        for file in files:
            place = target / file.relative_to(self.path)
            make_folder(place.parent)
            shutil.move(file, place)
        logger.warning("Files of an earlier run in %s were moved to %s", self.path, target)

    def mark_last(self, name: str) -> None:
        """Record which checkpoint is the last one.

        Args:
            name: Name of the file.
        """
        if self.path is not None and self.identity:
            self._last = name
            self._record()

    @property
    def last(self) -> str:
        """Name of the last checkpoint; empty if it is unknown."""
        return str(self._content().get("last", ""))

    def _record(self, **more: Any) -> None:
        assert self.path is not None
        content = {"id": self.identity, "last": self._last, "config": self._config, **more}
        write_atomically(sealed_json(content), self.path / RUN_FILE)

    @property
    def recorded_identity(self) -> str:
        """Identity in the folder; empty if there is none, or a run only began to begin."""
        content = self._content()
        return "" if content.get("beginning") else str(content.get("id", ""))

    @property
    def has_begun(self) -> bool:
        """Return whether the checkpoints in the folder are of the run recorded there."""
        return not self._content().get("beginning")

    def _content(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        file = self.path / RUN_FILE
        try:
            return unsealed_json(file.read_bytes(), file)
        except FileNotFoundError:
            return {}
        except DamagedFileError as error:
            logger.warning("%s. The newest checkpoint counts as the last one", error)
            return {}

    def _results(self) -> list[str]:
        if self.path is None or not self.has_begun:
            return []
        ignored = _BEST if self._resumes else ()
        return _found(self.path, tuple(name for name in _RESULTS if name not in ignored))

    def _files(self) -> list[Path]:
        assert self.path is not None
        names = _found(self.path, (*_RESULTS, *_FILES))
        if names and (self.path / CONFIG_FILE).exists():
            names.append(CONFIG_FILE)
        if names == [RUN_FILE]:
            return []
        return [self.path / name for name in names]


def written_settings(folder: str | Path) -> dict[str, Any]:
    """Read the settings of a run of an earlier version, whose checkpoints have none.

    Args:
        folder: Folder of the run.

    Returns:
        Values of its ``config.yaml`` by full keys; empty if it cannot be read. Settings
        without a value are left out, as later versions may fill them in.
    """
    try:
        content = yaml.safe_load((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(content, dict):
        return {}
    flat = flat_settings(content)
    return {key: value for key, value in flat.items() if value is not None}


def _found(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """List the files that match a pattern, relative to the folder."""
    return [
        str(file.relative_to(folder))
        for pattern in patterns
        for file in sorted(folder.glob(pattern))
        if file.is_file() and not file.name.endswith(".partial")
    ]


def _new_identity() -> str:
    return uuid.uuid4().hex

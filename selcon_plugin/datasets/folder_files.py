"""The image files below a folder, and the files that are left out, with the reason."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL

from selcon_plugin.datasets.reading import FORMATS, OPTIONAL_FORMATS
from selcon_plugin.installing import pip_install
from selcon_plugin.io.names import printable
from selcon_plugin.io.own_output import SHEET_MARK, is_output, own_entries

# By format: a file with such a suffix is listed by its name, and what it really contains is
# found when it is read.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "HEIC": (".heic", ".heif"),
}
IMAGE_SUFFIXES = frozenset(suffix for name in FORMATS for suffix in _SUFFIXES[name])
# Why the others are left out, with what the user can do.
_REMEDIES = {
    name: f"{name} images, which Pillow {PIL.__version__} does not read: "
    + pip_install("--upgrade", "pillow")
    for name in OPTIONAL_FORMATS
} | {"HEIC": "HEIC images, which are not read: convert them to JPEG or PNG"}
_UNREAD = {
    suffix: _REMEDIES[name]
    for name, suffixes in _SUFFIXES.items()
    for suffix in suffixes
    if name not in FORMATS
}
# Neither images nor worth a warning.
_TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".csv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log"}
    | {".npz", ".npy", ".mat", ".pth", ".pkl", ".ini", ".py", ".ipynb", ".bin", ".db"}
    | {".sh", ".toml", ".pdf", ".svg", ".lock"}
)
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".tmp", ".bak", "~")
# Folders and files of systems, network drives and viewers; those that begin with a dot are
# left out in any case (.ipynb_checkpoints, .thumbnails, ._NAME, .Trash-1000, .git).
_FOREIGN = frozenset(
    {"__macosx", "@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp"}
    | {"#recycle", "#snapshot", "~snapshot", "$recycle.bin", "recycler", "recycled"}
    | {"system volume information", "lost+found", "thumbs.db", "ehthumbs.db"}
    | {"ehthumbs_vista.db", "desktop.ini", "thumbs", "thumbnails", "__pycache__"}
    | {"network trash folder", "temporary items", "icon\r", "lightroom previews"}
)
_SNIFFED_BYTES, _SHEET_BYTES = 32, 512
_STARTS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIC": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"},
}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)

HIDDEN = "hidden or of another program"
OWN = "written by selcon"
LINKED_TWICE = "links to images that are in the list already"
UPWARD = "links to a folder above"
NO_FILE = "pipes, sockets or devices"
UNFINISHED = "unfinished or backup copies"
OTHER = "not images"
CLOSED = "folders that cannot be opened"
TEXT = "text or data"


@dataclass
class FolderFiles:
    """Files below a folder.

    Attributes:
        images: Paths of the image files below the folder, sorted.
        left_out: Paths below the folder of everything else, by the reason; a folder that is
            not entered counts as one and ends with a slash.
    """

    images: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def describe(self, *, reasons: Sequence[str] = ()) -> str:
        """Return one line that counts and names everything that is left out.

        Args:
            reasons: Reasons to name; empty for all but text and data files.

        Returns:
            The line; ``""`` if nothing is left out.
        """
        parts = []
        for reason, names in self.left_out.items():
            if reason in (reasons or set(self.left_out) - {TEXT}):
                shown = ", ".join(printable(name) for name in sorted(names)[:3])
                more = ", ..." if len(names) > 3 else ""
                parts.append(f"{len(names)} {reason} ({shown}{more})")
        return "; ".join(parts)


def list_images(folder: str | Path) -> FolderFiles:
    """List the image files below a folder, also in folders that are symbolic links.

    A file is an image by its suffix; without a known one, by its first bytes. Each folder
    is entered once, whatever links lead there, and no link leads to a folder above. A link
    to a file that is in the list itself is left out, as are hidden files, those of other
    programs, and what selcon has written.

    Args:
        folder: Existing folder.

    Returns:
        The images, and everything that is left out.
    """
    return _Walk(os.fspath(folder)).run()


class _Walk:
    def __init__(self, root: str) -> None:
        self._root = root
        self._found = FolderFiles()
        above = Path(os.path.realpath(root)).parents
        self._above = {_identity(parent) for parent in above}
        self._entered = {_identity(root)}
        self._folder_links: list[str] = []
        self._file_links: list[tuple[str, tuple[int, int]]] = []
        self._files: dict[int, set[int]] = defaultdict(set)  # file numbers by device

    def run(self) -> FolderFiles:
        """Enter the real folders first: where a link leads to one, its own name is kept."""
        self._enter("")
        while self._folder_links:
            links, self._folder_links = sorted(self._folder_links), []
            for name in links:
                self._follow(name)
        for name, (device, number) in self._file_links:
            if number in self._files.get(device, ()):
                self._found.left_out[LINKED_TWICE].append(name)
            else:
                self._found.images.append(name)
        self._found.images.sort(key=lambda name: name.split("/"))
        return self._found

    def _follow(self, name: str) -> None:
        identity = _identity(os.path.join(self._root, name))
        if identity in self._above:
            self._found.left_out[UPWARD].append(f"{name}/")
        elif identity in self._entered:
            self._found.left_out[LINKED_TWICE].append(f"{name}/")
        else:
            self._entered.add(identity)
            self._enter(name)

    def _enter(self, top: str) -> None:
        pending = [top]
        while pending:
            name = pending.pop()
            try:
                folder = os.path.join(self._root, name)
                entries = list(os.scandir(folder))
                device = os.stat(folder).st_dev
            except OSError:
                self._found.left_out[CLOSED].append(f"{name}/")
                continue
            if name and is_output(folder):  # a folder that the user names is read
                self._found.left_out[OWN].append(f"{name}/")
                continue
            own = own_entries(folder, {entry.name for entry in entries})
            for entry in entries:
                path = f"{name}/{entry.name}" if name else entry.name
                is_folder = _is_folder(entry)
                if reason := _is_foreign(entry.name) or (OWN if entry.name in own else ""):
                    self._found.left_out[reason].append(path + "/" * is_folder)
                elif is_folder:
                    pending.extend(self._folder(entry, path))
                else:
                    self._file(entry, path, device)

    def _folder(self, entry: os.DirEntry[str], path: str) -> Iterator[str]:
        """Yield a folder to enter now; a link is entered after all real folders."""
        if entry.is_symlink():
            self._folder_links.append(path)
            return
        identity = _identity(entry.path)
        if identity in self._entered:  # behind a link: a real folder that was entered
            self._found.left_out[LINKED_TWICE].append(f"{path}/")
            return
        self._entered.add(identity)
        yield path

    def _file(self, entry: os.DirEntry[str], path: str, device: int) -> None:
        reason = _why_no_image(entry)
        if reason:
            self._found.left_out[reason].append(path)
            return
        if entry.is_symlink():
            try:
                self._file_links.append((path, _identity(entry.path)))
            except OSError:  # broken: named as unreadable when it is read
                self._found.images.append(path)
            return
        self._files[device].add(entry.inode())
        self._found.images.append(path)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_foreign(name: str) -> str:
    return HIDDEN if name.startswith(".") or name.lower() in _FOREIGN else ""


def is_foreign(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or of another program.

    Args:
        name: Name without the folders above it.
    """
    return bool(_is_foreign(name))


def _why_no_image(entry: os.DirEntry[str]) -> str:
    """Return the reason to leave a file out; ``""`` for an image."""
    lower = entry.name.lower()
    suffix = os.path.splitext(lower)[1]
    if lower.endswith(_UNFINISHED):
        return UNFINISHED
    try:
        mode = entry.stat().st_mode if _is_special(entry) else stat.S_IFREG
    except OSError:  # a broken link
        return "" if suffix in IMAGE_SUFFIXES else OTHER
    if not stat.S_ISREG(mode):
        return NO_FILE  # opening a pipe would wait for its writer
    if suffix in IMAGE_SUFFIXES:
        is_sheet = "sheet" in lower and SHEET_MARK in _head(entry.path, _SHEET_BYTES)
        return OWN if is_sheet else ""
    if suffix in _TEXT_SUFFIXES:
        return TEXT
    if suffix in _UNREAD:
        return _UNREAD[suffix]
    found = _format_by_content(entry.path)
    return "" if found in FORMATS else _REMEDIES.get(found, OTHER)


def _is_special(entry: os.DirEntry[str]) -> bool:
    return not entry.is_file(follow_symlinks=False)


def _format_by_content(path: str) -> str:
    """Return the format of an image by its first bytes; ``""`` for anything else."""
    head = _head(path, _SNIFFED_BYTES)
    if head[4:8] == b"ftyp":  # a container of images and videos, which lists its brands
        brands = {head[start : start + 4] for start in (8, *range(16, len(head) - 3, 4))}
        return next((n for n, own in _BRANDS.items() if not own.isdisjoint(brands)), "")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return next((n for n, starts in _STARTS.items() if head.startswith(starts)), "")


def _head(path: str, size: int) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            return os.read(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError:
        return b""

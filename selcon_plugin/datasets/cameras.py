r"""The camera of each image, from the paths below the folder of images.

A pattern is searched where it belongs: one that contains a slash in the path below the
folder of images, any other one in single names: those of the files if it is found in a
fifth of them, otherwise those of the folders if more match there. What is meant for the
names of files is never found in the folders above them.

Without a pattern the sub-folders may be cameras, but also persons, tracks, days or the
parts of a data set. They are taken as cameras only if their names, their file names or
their sizes indicate it, since persons taken as cameras mislead the training by much more
than unknown cameras do.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from selcon_plugin.io.names import printable

NO_CAMERAS, FOLDER_CAMERAS = "none", "folders"

# More folders than this, or fewer images in each, are unlikely to be cameras.
_MOST_CAMERAS, _LEAST_IMAGES = 20, 100
# More folders than that with fewer images each are persons or tracks unless their names can
# mean nothing but cameras.
_FEW_IMAGES = 10
_MOST = 0.8  # fraction of the names that must agree
_MEANT = 0.2  # fraction of the files whose matching names show that names are meant

_WORDS = re.compile(r"[a-z]+|\d+")
_CAMERA_WORDS = frozenset(
    {"cam", "camera", "cams", "kamera", "camara", "webcam", "ipcam", "view", "channel"}
    | {"ch", "chan", "nvr", "dvr", "cctv", "gopro", "sensor", "rtsp", "ptz", "lens"}
)
_PLACE_WORDS = frozenset(
    {"door", "gate", "entrance", "entry", "exit", "lobby", "hall", "hallway", "corridor"}
    | {"stairs", "staircase", "stairway", "lift", "elevator", "escalator", "floor", "room"}
    | {"office", "kitchen", "street", "road", "crossing", "junction", "square", "parking"}
    | {"garage", "yard", "courtyard", "garden", "station", "platform", "shop", "store"}
    | {"mall", "checkout", "counter", "aisle", "warehouse", "dock", "roof", "terminal"}
    | {"bridge", "tunnel", "library", "campus", "reception", "foyer", "basement", "bus"}
    | {"north", "south", "east", "west", "front", "back", "rear", "left", "right"}
    | {"inside", "outside", "indoor", "outdoor", "upstairs", "downstairs", "desk"}
)
# The camera at the start of a name, as in cam1_0001 or ch03-track7.
_CAMERA_OF = re.compile(r"(?:[a-z]+[-_ ])*(?P<word>[a-z]+)[-_ ]?\d+(?=[-_ .])")
_CAMERA_CODE = re.compile(r"c[-_ ]?\d{1,3}(s\d+)?")
_ADDRESS = re.compile(r"\d{1,3}(\.\d{1,3}){3}.*")
_PERSON = re.compile(
    r"-?\d{3,}|(p|pid|id|ids|persons?|people|subject|subj|identity|track|tracklet|trk|tid"
    r"|obj|object|human|ped|pedestrian|player|cluster|class|label|group|outliers)[-_ ]?\d*"
)
_PART = re.compile(
    r"(bounding_box_|image_|images_|gt_)?(train|training|val|valid|validation|test|testing"
    r"|query|gallery|probe|bbox|train_all|all|trainval)|images?|crops?|labell?ed|detected"
    r"|multi-query|distractors|junk|data|raw"
)
_DAY = re.compile(
    r"(19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d.*|[0-3]\d[-_.][01]\d[-_.](19|20)\d\d.*"
    r"|(mon|tues|wednes|thurs|fri|satur|sun)day.*|day[-_ ]?\d+|morning|noon|evening|night"
)
# A camera in a file name, as in 0001_c3s1_000151_00.jpg or 0005_cam2.png.
_USUAL_FIELD, _ANY_FIELD = r"_c(\d+)", r"(?i)(?:^|[-_. ])c[a-z]*[-_]?(\d+)"
_FIELD = re.compile(r"(?:^|[-_. ])c(?:am(?:era)?)?[-_]?(\d{1,4})(?![a-rt-z0-9])", re.I)


class Cameras(NamedTuple):
    """Cameras of images.

    Attributes:
        names: Name of each image's camera as the user wrote it; None where unknown.
        doubt: What a person should know about sub-folders that are, or are not, taken as
            cameras, with the option that decides; ``""`` if there is no doubt.
    """

    names: list[str | None]
    doubt: str = ""


def find_cameras(paths: Sequence[str], camera_pattern: str = "") -> Cameras:
    """Find the camera of each image.

    Args:
        paths: Paths below the folder of images, with forward slashes.
        camera_pattern: Regular expression; its first group, or the whole match without a
            group, is the name. If the group takes no part in the match, the camera is
            unknown. ``"folders"`` takes the first sub-folder, ``"none"`` nothing, and
            ``""`` the first sub-folder where these are cameras by all appearances, below
            folders that hold all images.

    Returns:
        The cameras.

    Raises:
        ValueError: If the pattern is not a regular expression.
    """  # noqa: DOC502  (raised by the functions called here)
    if camera_pattern == NO_CAMERAS:
        return Cameras([None] * len(paths))
    folders = [path.partition("/")[0] if "/" in path else None for path in paths]
    if camera_pattern == FOLDER_CAMERAS:
        return Cameras(list(folders))
    if camera_pattern:
        return Cameras(_search(_compiled(camera_pattern), camera_pattern, paths))
    inner, around = list(paths), ""
    while (name := _folder_around(inner)) and not _is_one_camera(name):
        around += name + "/"
        inner = [path.partition("/")[2] for path in inner]
    folders = [path.partition("/")[0] if "/" in path else None for path in inner]
    are_cameras, doubt = _check_folders(inner, folders, around)
    return Cameras(list(folders) if are_cameras else [None] * len(paths), doubt)


def _folder_around(paths: Sequence[str]) -> str:
    """Return the name of a folder that holds all images in folders; ``""`` for none."""
    names = {path.partition("/")[0] if path.count("/") > 1 else "" for path in paths}
    return names.pop() if len(names) == 1 else ""


def _is_one_camera(name: str) -> bool:
    lower = name.lower()
    return _is_camera_name(lower) or _CAMERA_CODE.fullmatch(lower) is not None


def _compiled(camera_pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(camera_pattern)
    except re.error as error:
        raise ValueError(
            f"the camera pattern {camera_pattern!r} is not a regular expression: {error}"
        ) from error


def _search(pattern: re.Pattern[str], text: str, paths: Sequence[str]) -> list[str | None]:
    """Search in the names of the files, of the folders, or in the paths."""

    def in_file(path: str) -> re.Match[str] | None:
        return pattern.search(path.rpartition("/")[2])

    def in_folders(path: str) -> re.Match[str] | None:
        names = path.split("/")[-2::-1]  # the nearest first
        return next(filter(None, map(pattern.search, names)), None)

    places: list[Callable[[str], re.Match[str] | None]] = [in_file, in_folders]
    if "/" in text:
        places = []
    places.append(pattern.search)  # such as cam\d.*_x, across a slash
    found: list[re.Match[str] | None] = []
    for place in places:
        here = [place(path) for path in paths]
        if not found or _matches(here) > _matches(found):
            found = here
        # Names of files of which many match are meant, even if more folders match too.
        least = 1 if place is in_folders else _MEANT * len(paths)
        if _matches(found) >= max(1, least):
            break
    group = 1 if pattern.groups else 0
    return [None if match is None else match.group(group) or None for match in found]


def _matches(found: Iterable[re.Match[str] | None]) -> int:
    return sum(match is not None for match in found)


def _check_folders(
    paths: Sequence[str], folders: Sequence[str | None], around: str
) -> tuple[bool, str]:
    """Check whether the first sub-folders are cameras, and describe a doubt.

    Args:
        paths: Paths that begin with these sub-folders.
        folders: Sub-folder of each path; None for none.
        around: Folder that contains them all, with a slash; empty for none.

    Returns:
        Whether they are, and the doubt; ``""`` for none.
    """
    counts = Counter(name for name in folders if name is not None)
    if not counts:
        return False, ""
    names = list(counts)
    fields = _fields(paths, folders)
    usual = statistics.median(counts.values())
    are_small = len(names) > _MOST_CAMERAS and usual < _FEW_IMAGES
    if shared := _cameras_shared(names):
        reason = f"name a camera and something else each, {shared}"
        return False, _refusal(names, reason, around)
    if _agree(names, _is_only_camera if are_small else _is_camera_name):
        return True, ""
    if len(names) == 1:  # such as a folder around all images
        return _CAMERA_CODE.fullmatch(names[0].lower()) is not None, ""
    if reason := _why_not(names, fields, paths):
        return False, _refusal(names, reason, around)
    persons = _agree(names, _PERSON.fullmatch)
    if not are_small and (
        _agree(names, _CAMERA_CODE.fullmatch)
        or _fields_follow(fields, counts)
        or _persons_repeat(paths)
    ):
        return True, ""
    if persons or are_small:
        reason = f"look like persons or tracks (a median of {usual:g} images)"
        return False, _refusal(names, reason, around, labels=True)
    if len(names) <= _MOST_CAMERAS and usual >= _LEAST_IMAGES:
        return True, (
            f"{len(names)} sub-folders ({_some(names)}) with a median of {usual:g} images "
            "are taken as cameras. If they are persons, give --camera-pattern none"
        )
    reason = f"may be persons (a median of {usual:g} images)"
    return False, _refusal(names, reason, around, labels=True)


def _cameras_shared(names: Sequence[str]) -> str:
    """Return the pattern of cameras that several sub-folders share; ``""`` for none.

    A sub-folder may be a person, a track or a day of one camera, as in ``cam1_0001``.
    """
    found = [
        match
        for name in names
        if (match := _CAMERA_OF.match(name.lower()))
        and not _is_one_camera(name[match.end() + 1 :])  # such as recorder and channel
    ]
    cameras = {match[0] for match in found}
    words = {match["word"] for match in found}
    if len(words) != 1 or not words <= _CAMERA_WORDS | {"c"}:
        return ""
    if len(found) < _MOST * len(names) or 2 * len(cameras) > len(names):
        return ""
    return rf"which --camera-pattern '(?i)({words.pop()}[-_ ]?\d+)' would read,"


def _why_not(
    names: Sequence[str], fields: dict[str, set[str]], paths: Sequence[str]
) -> str:
    """Return why the sub-folders are no cameras whatever else they look like."""
    if _agree(names, _PART.fullmatch):
        return "look like parts of a data set"
    if _agree(names, _DAY.fullmatch):
        return "look like days"
    several = sum(len(numbers) > 1 for numbers in fields.values())
    if several and 2 * several >= len(names):
        files = (path.rpartition("/")[2] for path in paths)
        are_usual = all(re.search(_USUAL_FIELD, f) for f in files if _FIELD.search(f))
        pattern = _USUAL_FIELD if are_usual else _ANY_FIELD
        return (
            "hold images of several cameras each by their file names, which "
            f"--camera-pattern '{pattern}' would read,"
        )
    return ""


def _refusal(
    names: Sequence[str], reason: str, around: str, *, labels: bool = False
) -> str:
    pattern = "'^" + "[^/]+/" * around.count("/") + "([^/]+)/'" if around else "folders"
    place = f" of {printable(around)}" if around else ""
    taken = "taken neither as cameras nor as labels" if labels else "not taken as cameras"
    return (
        f"{len(names)} sub-folders{place} ({_some(names)}) {reason} and are {taken}: "
        f"cameras unknown. If each is a camera, give --camera-pattern {pattern}; a regular "
        "expression finds cameras in file names; none leaves them out"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in sorted(names)[:4])
    return f"{shown}, ..." if len(names) > 4 else shown


def _agree(names: Sequence[str], test: Callable[[str], object]) -> bool:
    return sum(bool(test(name.lower())) for name in names) >= _MOST * len(names)


def _is_camera_name(name: str) -> bool:
    if _ADDRESS.fullmatch(name):
        return True
    return not (_CAMERA_WORDS | _PLACE_WORDS).isdisjoint(_WORDS.findall(name))


def _is_only_camera(name: str) -> bool:
    """Return whether a name is that of a camera without a further number or a place."""
    parts = _WORDS.findall(name)
    numbers: int = sum(part.isdigit() for part in parts)
    if _ADDRESS.fullmatch(name):
        return numbers == 4
    return numbers <= 1 and not _CAMERA_WORDS.isdisjoint(parts)


def _fields(paths: Sequence[str], folders: Sequence[str | None]) -> dict[str, set[str]]:
    """Return the cameras that the file names in each sub-folder name."""
    found: dict[str, set[str]] = defaultdict(set)
    for path, folder in zip(paths, folders, strict=True):
        match = _FIELD.search(path.rpartition("/")[2])
        if match and folder is not None:
            found[folder].add(match[1])
    return found


def _fields_follow(fields: dict[str, set[str]], counts: Counter[str]) -> bool:
    """Return whether each sub-folder has a camera of its own by its file names."""
    numbers = [next(iter(found)) for found in fields.values() if len(found) == 1]
    return 1 < len(numbers) == len(counts) == len(set(numbers))


def _persons_repeat(paths: Sequence[str]) -> bool:
    """Return whether most second sub-folders are persons that several first ones hold."""
    above: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        parts = path.split("/")
        if len(parts) > 2:
            above[parts[1]].add(parts[0])
    shared = [name for name, firsts in above.items() if len(firsts) > 1]
    # More first than second ones are persons with numbered tracks.
    if len({first for firsts in above.values() for first in firsts}) > len(above):
        return False
    return 2 * len(shared) > len(above) > 0 and _agree(shared, _PERSON.fullmatch)

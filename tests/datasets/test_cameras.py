"""Sub-folders are cameras by their names, file names or sizes, and not otherwise."""

import re

import pytest

from selcon_plugin.datasets.cameras import find_cameras


def paths_of(folders, files=("{i:04d}.jpg",), count=4):
    return [
        f"{folder}/{name.format(i=i, folder=folder, k=k)}"
        for k, folder in enumerate(folders, start=1)
        for i in range(count)
        for name in files
    ]


CAMERAS = {
    "cam": paths_of(["cam1", "cam2", "cam10"]),
    "camera": paths_of(["Camera 1", "Camera-02", "camera_c"]),
    "code": paths_of(["c1", "c2", "c3"]),
    "sequence": paths_of(["c1s1", "c2s3"]),
    "place": paths_of(["door", "lobby"], count=1),
    "places": paths_of(["Main entrance", "north gate", "2nd floor stairs", "parking_lot"]),
    "address": paths_of(["192.168.0.11", "192.168.0.12"]),
    "channel": paths_of(["ch01", "ch02"]),
    "recorder": paths_of(["NVR-3-view", "NVR-4-view"]),
    "mostly": paths_of(["cam1", "cam2", "cam3", "cam4", "extra"]),
    "many": paths_of([f"cam{i:02d}" for i in range(40)], count=2),
    "persons in cameras": paths_of(["A", "B"], ["0001/{i}.jpg", "0002/{i}.jpg"]),
    "by file name": paths_of(["A", "B"], ["{i:04d}_c{k}s1_000151_01.jpg"]),
    "market names": paths_of(["cam1", "cam2"], ["{i:04d}_c{k}s1_000151_01.jpg"]),
    "crop numbers": paths_of(["door", "lobby"], ["x_c{i}.jpg"]),
    "large": paths_of(["A", "B", "C"], count=120),
    "recorder and channel": paths_of(["nvr1_ch1", "nvr1_ch2", "nvr2_ch1", "nvr2_ch2"]),
    "camera and place": paths_of(["cam1_door", "cam1_hall", "cam2_door", "cam2_hall"]),
    "numbers, large": paths_of(["1", "2", "3"], count=120),
}
NO_CAMERAS = {
    "zeros": paths_of([f"{i:04d}" for i in range(12)]),
    "junk too": paths_of(["-1", "0000", "0001", "0002", "0003", "0004"]),
    "id": paths_of(["id_1", "id_2", "ID-3"]),
    "person": paths_of(["Person 1", "person2", "person_10"]),
    "tracks": paths_of([f"track_{i}" for i in range(5)], count=200),
    "names": paths_of(["alice", "bob", "carol"]),
    "names, files too": paths_of(["alice", "bob"], ["{folder}_{i}.jpg"]),
    "market by person": paths_of(
        ["0001", "0002"], ["{folder}_c1s1_{i}_00.jpg", "{folder}_c4s2_{i}_00.jpg"]
    ),
    "names by camera": paths_of(["al", "bo"], ["x{i}_c1.jpg", "x{i}_c2.jpg"], count=150),
    "c for class": paths_of(["c1", "c2"], ["{i}_c1s1_0.jpg", "{i}_c2s1_0.jpg"]),
    "parts": paths_of(["train", "val"], count=300),
    "market": paths_of(["bounding_box_train", "bounding_box_test", "query"], count=300),
    "days": paths_of(["2026-05-01", "2026-05-02"], count=300),
    "weekdays": paths_of(["Monday", "Tuesday"], count=300),
    "clusters": paths_of(["0000", "0001", "outliers"]),
    "few": paths_of(["A", "B", "C"]),
    "many": paths_of([f"x{chr(97 + i)}" for i in range(25)], count=300),
    "one folder": paths_of(["all"], count=300),
    "no folder": ["a.jpg", "b.jpg"],
    "none": [],
}


# 507 persons of two images each, as ImageFolder lays them out.
NUMBERS = range(1, 508)
PERSONS = {
    "numbers": paths_of([f"{i:04d}" for i in NUMBERS], count=2),
    "few digits": paths_of([f"{i}" for i in NUMBERS], count=2),
    "person": paths_of([f"person_{i}" for i in NUMBERS], count=2),
    "names": paths_of([f"a{chr(97 + i % 26)}ron{i}" for i in NUMBERS], count=2),
    "c for class": paths_of([f"c{i:03d}" for i in NUMBERS], count=2),
    "at a place": paths_of([f"hall_{i:03d}" for i in NUMBERS], count=2),
    "camera and number": paths_of([f"cam{i % 6}_{i:04d}" for i in NUMBERS], count=2),
    "code and number": paths_of([f"c{i % 6}_p{i:04d}" for i in NUMBERS], count=2),
    "numbers in the files": paths_of([f"p{i}" for i in NUMBERS], ["c{k}_{i}.jpg"], count=2),
    "with tracks": paths_of([f"x{i}" for i in NUMBERS], ["001/{i}.jpg", "002/{i}.jpg"], 1),
    "by camera": paths_of([f"{i:04d}" for i in NUMBERS], ["c1_{i}.jpg", "c2_{i}.jpg"], 1),
}


@pytest.mark.parametrize("kind", PERSONS)
@pytest.mark.parametrize("around", ["", "crops/", "my/crops/"])
def test_many_folders_of_few_images_are_persons_and_it_is_said(kind, around):
    paths = [around + path for path in PERSONS[kind]]
    found = find_cameras(paths)
    assert set(found.names) == {None}
    assert f"507 sub-folders{' of ' * bool(around)}{around} (" in found.doubt
    is_clear = kind in ("camera and number", "code and number", "by camera")
    assert ("nor as labels" in found.doubt) != is_clear
    # What the message advises does what it says.
    advice = re.search(r"--camera-pattern ('[^']*'|\w+)", found.doubt)[1].strip("'")
    cameras = find_cameras(paths, advice).names
    count = {"by camera": 2}.get(kind, 6) if is_clear else 507
    assert len(set(cameras) - {None}) == count


def test_names_of_cameras_only_are_cameras_whatever_their_number():
    for pattern in ("cam{}", "Camera {}", "192.168.0.{}", "rtsp-{:03d}"):
        paths = paths_of([pattern.format(i) for i in NUMBERS], count=2)
        assert len(set(find_cameras(paths).names)) == 507


def test_folders_around_all_images_are_passed():
    paths = ["data/crops/cam1/a.jpg", "data/crops/cam2/x/b.jpg"]
    assert find_cameras(paths).names == ["cam1", "cam2"]
    # But not one that is a camera itself, and the literal option means the first one.
    assert find_cameras(["cam1/mon/a.jpg", "cam1/tue/b.jpg"]).names == ["cam1"] * 2
    assert find_cameras(paths, "folders").names == ["data"] * 2
    beside = [*paths, "data/c.jpg"]
    assert find_cameras(beside).names == [None] * 3


@pytest.mark.parametrize("kind", CAMERAS)
def test_folders_that_are_cameras(kind):
    paths = CAMERAS[kind]
    found = find_cameras(paths)
    assert found.names == [path.partition("/")[0] for path in paths]
    assert bool(found.doubt) == ("large" in kind)


@pytest.mark.parametrize("kind", NO_CAMERAS)
def test_folders_that_are_no_cameras(kind):
    found = find_cameras(NO_CAMERAS[kind])
    assert set(found.names) <= {None}
    told = "--camera-pattern folders" in found.doubt
    assert told == (kind not in ("one folder", "no folder", "none"))


def test_hint_names_the_pattern_that_reads_file_names():
    found = find_cameras(NO_CAMERAS["market by person"])
    assert r"--camera-pattern '_c(\d+)'" in found.doubt
    names = find_cameras(NO_CAMERAS["market by person"], r"_c(\d+)").names
    assert set(names) == {"1", "4"}


def test_folders_and_none_are_as_the_user_says():
    paths = ["0001/a.jpg", "0002/x/b.jpg", "c.jpg"]
    assert find_cameras(paths, "folders").names == ["0001", "0002", None]
    assert find_cameras(paths, "none").names == [None] * 3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"(?:cam1|cam(2))", [None, "2", None]),  # the group takes no part
        (r"cam([7-9])?", [None] * 3),
        (r"cam(\d?)", ["1", "2", None]),
        (r"cam(x?)", [None] * 3),  # an empty name is no name
        (r"cam\d", ["cam1", "cam2", None]),
    ],
)
def test_a_group_without_part_in_the_match_is_no_camera(pattern, expected):
    assert find_cameras(["cam1/a.jpg", "cam2/a.jpg", "x/a.jpg"], pattern).names == expected


@pytest.mark.parametrize(
    ("pattern", "paths", "expected"),
    [
        # Meant for file names: never found in the folders above.
        (r"c(\d)", ["pic1/0001_c3.jpg", "pic1/0002_c4.jpg"], ["3", "4"]),
        (r"c(\d)", ["pic1/0001_c3.jpg", "pic2/other.jpg"], ["3", None]),
        (r"c(\d)", ["pic1/0_c3.jpg", *(f"pic1/{i}.jpg" for i in "12")], ["3", None, None]),
        (r"^(\d+)_", ["2024_x/5_a.jpg", "2024_x/b.jpg"], ["5", None]),
        # Meant for folders: the nearest one, whatever a few file names hold.
        (r"cam(\d)", ["cam7/x/cam1/a.jpg", "cam7/x/cam2/b.jpg"], ["1", "2"]),
        (r"cam(\d)", [*(["cam1/0.jpg"] * 9), "cam2/webcam3.jpg"], [*"111111111", "2"]),
        # With a slash: in the path below the folder of images.
        (r"^(\w+)/", ["a/1_b.jpg", "c/2.jpg"], ["a", "c"]),
        (r"([^/]+)/[^/]+$", ["a/x/1.jpg", "b/y/2.jpg"], ["x", "y"]),
        # Across a slash that it does not name.
        (r"cam\d.*_(\w)\.", ["cam1/x_a.jpg", "cam2/x_b.jpg"], ["a", "b"]),
    ],
)  # fmt: skip
def test_a_pattern_is_searched_where_it_belongs(pattern, paths, expected):
    assert find_cameras(paths, pattern).names == expected


@pytest.mark.parametrize("name", ["+1", "=cmd", " cam 1", "Caméra", "c\x1b[2J", "M\udcfc"])
def test_names_are_kept_as_they_are_written(name):
    assert find_cameras([f"{name}/a.jpg"], "folders").names == [name]
    assert find_cameras([f"{name}/a.jpg"], "(.+)/").names == [name]


def test_doubt_is_printable():
    found = find_cameras([f"p\x1b]0;{i}\x07\udcfc/a.jpg" for i in range(4)])
    assert found.doubt.isprintable()
    assert r"p\x1b]0;0\x07\udcfc" in found.doubt


def test_pattern_that_is_no_expression_is_refused():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        find_cameras(["a.jpg"], "(")

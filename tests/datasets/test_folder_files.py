"""Images below a folder are found, and everything else is counted and named."""

import os
import re
import socket
from pathlib import Path

import pytest
from PIL import Image

from helpers.hosts import run_python
from selcon_plugin.datasets import read_image_folder
from selcon_plugin.datasets.folder_files import (
    CLOSED,
    HIDDEN,
    LINKED_TWICE,
    NO_FILE,
    OTHER,
    OWN,
    TEXT,
    UNFINISHED,
    UPWARD,
    list_images,
)
from selcon_plugin.datasets.reading import FORMATS, read_rgb
from selcon_plugin.io.own_output import mark_output


def save(path, kind="PNG"):
    if kind not in FORMATS:
        pytest.skip(f"Pillow was built without {kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8)).save(path, kind)
    return path


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "crops" / "cam1" / "a.png")
    save(tmp_path / "crops" / "cam2" / "b.png")
    return tmp_path / "crops"


OURS = ["cam1/a.png", "cam2/b.png"]


def left_out(folder):
    return {reason: sorted(names) for reason, names in list_images(folder).left_out.items()}


# --- links -------------------------------------------------------------------------------


def test_folders_that_are_links_are_read(folder, tmp_path):
    save(tmp_path / "nas" / "c.png")
    save(tmp_path / "nas" / "deep" / "d.png")
    (folder / "cam3").symlink_to(tmp_path / "nas")
    assert list_images(folder).images == [*OURS, "cam3/c.png", "cam3/deep/d.png"]
    assert not left_out(folder)
    only = tmp_path / "only"
    only.mkdir()
    (only / "cam1").symlink_to(folder / "cam1")
    (only / "cam2").symlink_to("../crops/cam2")  # relative
    assert list_images(only).images == OURS
    assert [item.camera for item in read_image_folder(only)] == ["cam1", "cam2"]
    (tmp_path / "link").symlink_to(folder)  # the folder itself
    assert list_images(tmp_path / "link").images == [*OURS, "cam3/c.png", "cam3/deep/d.png"]


def test_a_folder_is_read_once_whatever_links_lead_to_it(folder, tmp_path):
    (folder / "again").symlink_to(folder / "cam1")
    (folder / "cam2" / "inside").symlink_to(folder / "cam1")
    save(tmp_path / "nas" / "c.png")
    (folder / "x").symlink_to(tmp_path / "nas")
    (folder / "y").symlink_to(folder / "x")  # a link to a link
    assert list_images(folder).images == [*OURS, "x/c.png"]
    assert left_out(folder) == {LINKED_TWICE: ["again/", "cam2/inside/", "y/"]}


@pytest.mark.parametrize("target", [".", "..", "cam1", "/", "self"])
def test_circles_end(folder, target):
    place = folder / "cam1" / "self"
    place.symlink_to({"cam1": str(folder / "cam1"), "self": "self"}.get(target, target))
    found = list_images(folder)
    assert found.images == OURS
    assert sum(map(len, found.left_out.values())) == 1
    assert set(found.left_out) <= {UPWARD, LINKED_TWICE, OTHER}


def test_two_folders_that_link_to_each_other(tmp_path, folder):
    save(tmp_path / "one" / "1.png")
    save(tmp_path / "two" / "2.png")
    (tmp_path / "one" / "two").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "one").symlink_to(tmp_path / "one")
    (folder / "one").symlink_to(tmp_path / "one")
    assert list_images(folder).images == [*OURS, "one/1.png", "one/two/2.png"]


def test_links_to_files(folder, tmp_path):
    outside = save(tmp_path / "outside.png")
    (folder / "best").mkdir()
    (folder / "best" / "1.png").symlink_to(folder / "cam1" / "a.png")  # listed already
    (folder / "best" / "2.png").symlink_to(outside)
    (folder / "best" / "3.png").symlink_to("nowhere.png")  # found unreadable later
    (folder / "best" / "4.txt").symlink_to("nowhere.txt")
    os.link(outside, folder / "best" / "5.png")  # a file like any other
    found = list_images(folder).images
    assert found == [f"best/{i}.png" for i in (3, 5)] + OURS
    assert left_out(folder) == {
        LINKED_TWICE: ["best/1.png", "best/2.png"],
        OTHER: ["best/4.txt"],
    }


# --- kinds of files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((f"x{suffix}", "JPEG") for suffix in (".jpg", ".JPEG", ".jfif", ".jpe")),
        *(("x", "JPEG"), ("x.x", "JPEG")),
        *(("x.tif", "TIFF"), ("x.TIFF", "TIFF"), ("x", "TIFF"), ("x.gif", "GIF")),
        *(("x", "GIF"), ("x", "PNG"), ("x", "WEBP"), ("x", "BMP"), ("x.raw", "BMP")),
        *(("x", "AVIF"), ("x.avif", "AVIF"), ("x.AVIFS", "AVIF")),
        *(("frame.000123", "JPEG"), ("x.dib", "BMP"), ("x 2024.05.01 12.30", "PNG")),
    ],
)  # fmt: skip
def test_images_are_known_by_suffix_or_content(folder, name, kind):
    save(folder / name, kind)
    assert list_images(folder).images == [*OURS, name]
    assert not left_out(folder)


def test_other_files_are_counted_and_named(folder, caplog):
    for name in ("a.pcx", "b.pcx", "clip.mp4", "c.jxl", "noise", "BM"):
        (folder / name).write_bytes(b"BMP is not meant by this text")
    (folder / "notes.txt").write_text("text")
    (folder / "half.jpg.part").write_bytes(b"\xff\xd8\xff")
    save(folder / "old.png~")
    assert list_images(folder).images == OURS
    assert left_out(folder) == {
        OTHER: ["BM", "a.pcx", "b.pcx", "c.jxl", "clip.mp4", "noise"],
        TEXT: ["notes.txt"],
        UNFINISHED: ["half.jpg.part", "old.png~"],
    }
    read_image_folder(folder)
    assert "6 not images (BM, a.pcx, b.pcx, ...)" in caplog.text
    assert "2 unfinished or backup copies (half.jpg.part, old.png~)" in caplog.text
    assert "notes.txt" not in caplog.text  # no reason to warn


@pytest.mark.parametrize(
    "name",
    [
        *(".ipynb_checkpoints", "@eaDir", ".thumbnails", "__MACOSX", "lost+found"),
        *("#recycle", "$RECYCLE.BIN", ".Trash-1000", "System Volume Information", ".git"),
        *("@Recycle", "#snapshot", ".AppleDouble", "$Recycle.Bin", "Thumbnails"),
    ],
)
def test_folders_of_other_programs_are_left_out(folder, name, caplog):
    save(folder / name / "x.png")
    save(folder / "cam1" / name / "deep" / "y.png")
    assert list_images(folder).images == OURS
    assert left_out(folder) == {HIDDEN: sorted([f"{name}/", f"cam1/{name}/"])}
    assert [item.camera for item in read_image_folder(folder)] == ["cam1", "cam2"]
    assert f"2 hidden or of another program ({name}/, cam1/{name}/)" in caplog.text or (
        f"2 hidden or of another program (cam1/{name}/, {name}/)" in caplog.text
    )


@pytest.mark.parametrize(
    "name",
    ["._a.png", ".hidden.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "ehthumbs.db"],
)
def test_files_of_other_programs_are_left_out(folder, name):
    (folder / name).write_bytes(b"\xff\xd8\xff")
    assert list_images(folder).images == OURS
    assert left_out(folder) == {HIDDEN: [name]}


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    save(tmp_path / ".cache" / "@eaDir" / "x" / "a.png")
    assert list_images(tmp_path / ".cache" / "@eaDir").images == ["x/a.png"]


def test_pipes_sockets_and_devices_are_never_opened(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("pipe.jpg", "pipe", "pipe.txt"):
        os.mkfifo(name)
    Path("device.png").symlink_to("/dev/zero")
    Path("link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind("socket.jpg")
        assert list_images(folder).images == OURS
        names = ["device.png", "link", "pipe", "pipe.jpg", "pipe.txt", "socket.jpg"]
        assert left_out(folder) == {NO_FILE: names}


def test_folders_that_cannot_be_opened_are_named(folder, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("cam2"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list_images(folder).images == ["cam1/a.png"]
    assert left_out(folder) == {CLOSED: ["cam2/"]}


def test_error_without_images_names_the_other_files(tmp_path):
    (tmp_path / "a.pcx").write_bytes(b"pcx")
    with pytest.raises(ValueError, match=r"no image files.*1 not images \(a\.pcx\)"):
        read_image_folder(tmp_path)
    (tmp_path / "a.pcx").rename(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"no image files.*1 text or data \(a\.txt\)"):
        read_image_folder(tmp_path)


def test_types_that_are_not_read_are_named_with_a_remedy(folder, caplog):
    (folder / "a.HEIC").write_bytes(b"anything")
    # The first bytes of an iPhone's photo.
    (folder / "b").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heicMiPr")
    (folder / "clip").write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41")
    read_image_folder(folder)
    assert re.search(r"2 HEIC images.*convert them.*\(a\.HEIC, b\)", caplog.text)
    assert left_out(folder)[OTHER] == ["clip"]


def test_avif_is_read_or_named_with_a_remedy(folder):
    """A Pillow that was built without AVIF: in a process where its decoder is missing."""
    save(folder / "x.avif", "AVIF")
    save(folder / "y", "AVIF")
    code = (
        "import json, logging\nsys.modules['PIL._avif'] = None\n"
        "from selcon_plugin.datasets.folder_files import list_images\n"
        f"found = list_images({str(folder)!r})\n"
        "print(json.dumps([found.images, found.left_out, found.describe()]))"
    )
    images, others, described = run_python(code)
    assert images == OURS
    assert [sorted(names) for names in others.values()] == [["x.avif", "y"]]
    assert re.search(r"2 AVIF images, .*pip install --upgrade pillow \(x\.avif", described)
    assert list_images(folder).images == [*OURS, "x.avif", "y"]
    assert {read_rgb(folder / name).size for name in ("x.avif", "y")} == {(4, 8)}


# --- names -------------------------------------------------------------------------------

NAMES = [
    b"M\xfcller.png",
    b"\x1b]0;x\x07.png",
    b"two\nlines.png",
    b"-x.png",
    b"100%s {0}.png",
]
NAMES += [b"a" * 250 + b".png", "\u202egnp.png".encode(), b"back\\slash.png", b"a: b.png"]


def test_any_name_is_listed_and_messages_are_printable(folder, caplog):
    source = save(folder / "cam1" / "a.png").read_bytes()
    for name in NAMES:
        with open(os.fsencode(folder) + b"/cam2/" + name, "wb") as stream:
            stream.write(source)
        with open(os.fsencode(folder) + b"/x" + name[:200] + b".pcx", "wb") as stream:
            stream.write(b"pcx")
    items = read_image_folder(folder)
    listed = {os.fsencode(item.path).rpartition(b"/")[2] for item in items}
    assert listed == {*NAMES, b"a.png", b"b.png"}
    assert all(line.isprintable() for line in caplog.messages)
    assert "not images" in caplog.text


# --- own output --------------------------------------------------------------------------


def test_own_output_is_never_taken_for_images(folder):
    for place in (folder, folder / "out" / "clusters"):  # also beside a user's images
        save(place / "links" / "0000" / "0000_a.png")
        save(place / "contact_sheet.jpg", "JPEG")
        (place / "clusters.csv").write_text("image,cluster,confidence,camera\n")
    assert list_images(folder).images == OURS
    assert left_out(folder)[OWN] == [
        "contact_sheet.jpg",
        "links/",
        "out/clusters/contact_sheet.jpg",
        "out/clusters/links/",
    ]


def test_a_marked_folder_is_known_wherever_it_is_moved(folder):
    save(folder / "moved" / "0000" / "0000_a.png")
    mark_output(folder / "moved")
    assert list_images(folder).images == OURS
    assert left_out(folder) == {OWN: ["moved/"]}
    assert list_images(folder / "moved").images == ["0000/0000_a.png"]  # as named


def test_files_of_a_user_with_such_names_are_images(folder):
    save(folder / "links" / "x.png")
    save(folder / "contact_sheet.jpg", "JPEG")
    (folder / "clusters.csv").write_text("my,own,table\n")
    assert list_images(folder).images == [*OURS, "contact_sheet.jpg", "links/x.png"]

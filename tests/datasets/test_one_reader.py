"""The same picture by any door gives the same pixels; what a file may cost is bounded."""

import io
import os
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.datasets import reading
from selcon_plugin.datasets.reading import ImageReadError, as_rgb, read_rgb

SIZE = (5, 9)
SUFFIXES = {
    "1": ("png", "tif", "bmp"),
    "L": ("png", "tif", "bmp", "jpg"),
    "P": ("png", "gif", "tif"),
    "PA": ("tif",),
    "LA": ("png", "tif"),
    "RGB": ("png", "jpg", "webp", "avif", "bmp", "tif"),
    "RGBA": ("png", "webp", "avif", "tif"),
    "CMYK": ("jpg", "tif"),
    "YCbCr": ("jpg", "tif"),
    "I;16": ("png", "tif"),
    "I;16B": ("tif",),
    "I": ("tif",),
    "LAB": ("tif",),
}
CASES = [(mode, suffix) for mode, names in SUFFIXES.items() for suffix in names]


def picture(mode):
    rng = np.random.default_rng(7)
    width, height = SIZE
    if mode.startswith("I"):
        kind = {"I": np.int32, "I;16": np.uint16, "I;16B": np.dtype(">u2")}[mode]
        return Image.fromarray(rng.integers(0, 2**16, (height, width)).astype(kind))
    if mode == "LAB":
        raw = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.frombytes("LAB", SIZE, raw.tobytes())
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode == "PA":
        image = rgba.convert("RGB").convert("P").convert("PA")
        image.putalpha(rgba.getchannel("A"))
        return image
    return (
        rgba.convert("RGB").convert(mode)
        if mode not in ("LA", "RGBA")
        else (rgba.convert(mode))
    )


def doors(file):
    """The picture of a file as a path, an open image, a copy of it, and as bytes."""
    yield Path(file)
    yield str(file)
    with Image.open(file) as image:
        yield image
    # Pillow itself scrambles a turned TIFF that it opened by its name.
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        yield image.copy()
    yield file.read_bytes()
    yield bytearray(file.read_bytes())


def pixels_or_error(image):
    try:
        return np.asarray(as_rgb(image)).tolist()
    except (ValueError, OSError) as error:
        return str(error).rpartition(": ")[2]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("mode", "suffix"), CASES)
def test_pixels_do_not_depend_on_the_door(tmp_path, mode, suffix):
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {} if suffix in ("bmp", "gif") else {"exif": exif}
        file = tmp_path / f"{orientation}.{suffix}"
        try:
            picture(mode).save(file, **options)
        except (OSError, KeyError) as error:
            pytest.skip(f"Pillow cannot write it: {error}")
        expected = pixels_or_error(file)
        for image in doors(file):
            assert pixels_or_error(image) == expected
        if mode != "LAB" and options:
            turned = orientation in (5, 6, 7, 8)
            assert np.shape(expected) == (*(SIZE if turned else SIZE[::-1]), 3)


def test_pixels_are_turned_once_only(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB").save(tmp_path / "a.png", exif=exif)
    once = read_rgb(tmp_path / "a.png")
    assert once.size == SIZE[::-1]
    assert as_rgb(once).tobytes() == as_rgb(as_rgb(once)).tobytes() == once.tobytes()
    once.save(tmp_path / "b.png")
    assert read_rgb(tmp_path / "b.png").tobytes() == once.tobytes()


@pytest.mark.parametrize("mode", [mode for mode in SUFFIXES if mode != "LAB"])
def test_an_image_in_memory_is_not_changed(mode):
    image = picture(mode)
    image.getexif()[0x0112] = 3
    before = (image.mode, image.size, image.tobytes(), dict(image.info))
    as_rgb(image)
    assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


@pytest.mark.parametrize(
    ("mode", "key"), [("P", 3), ("RGB", (1, 2, 3)), ("L", 7), ("P", bytes(range(256)))]
)
def test_transparent_colors_and_color_profiles(tmp_path, mode, key):
    image = picture(mode)
    image.putpixel((0, 0), key if not isinstance(key, bytes) else 0)
    image.save(tmp_path / "a.png", transparency=key, icc_profile=b"\0" * 200)
    expected = np.asarray(read_rgb(tmp_path / "a.png"))
    assert not expected[0, 0].any()  # transparent is black
    for door in doors(tmp_path / "a.png"):
        assert np.array_equal(np.asarray(as_rgb(door)), expected)


@pytest.mark.parametrize("mode", ["La", "RGBa", "RGBX", "HSV"])
def test_modes_of_memory_only(mode):
    base = picture("LA" if mode == "La" else "RGBA" if mode == "RGBa" else "RGB")
    image = base.convert(mode)
    assert as_rgb(image).size == SIZE
    if mode in ("La", "RGBa"):
        straight = image.convert("LA" if mode == "La" else "RGBA")
        assert as_rgb(image).tobytes() == as_rgb(straight).tobytes()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif", "a.png"])
def test_animations_show_their_first_frame(tmp_path, name):
    first, second = picture("RGB").convert("P"), picture("RGB").rotate(180).convert("P")
    first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    expected = np.asarray(read_rgb(tmp_path / name))
    for door in doors(tmp_path / name):
        assert np.array_equal(np.asarray(as_rgb(door)), expected)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("F", (2, 2)),
        Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)),
        np.zeros((2, 2), dtype=np.uint8),
        np.zeros((2, 2, 4), dtype=np.uint8),
        np.zeros((2, 2, 3), dtype=np.float32),
        np.zeros((0, 2, 3), dtype=np.uint8),
        None,
        7,
    ],
)
def test_images_in_memory_without_a_meaning_are_refused(image):
    with pytest.raises(ValueError, match=r"no known white|an image must be"):
        as_rgb(image)


def test_bytes_of_no_image_are_refused():
    for content in (b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n{} loop\n"):
        with pytest.raises(ImageReadError, match=r"bytes: "):
            as_rgb(content)


# --- what one file may cost --------------------------------------------------------------


OTHER_FORMATS = ("EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "PPM", "DDS", "JPEG2000")


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_other_formats_are_not_tried_whatever_the_name(tmp_path, kind, monkeypatch):
    image = picture("RGB").resize((16, 16))
    image.save(tmp_path / "x", format=kind)
    (tmp_path / "x").rename(tmp_path / "x.jpg")
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("started a program"))
    for door in (tmp_path / "x.jpg", (tmp_path / "x.jpg").read_bytes()):
        with pytest.raises(ImageReadError, match=r"not an image"):
            as_rgb(door)


def test_postscript_that_never_ends_is_no_image(tmp_path):
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\n%%EndComments\n"
    (tmp_path / "x.jpg").write_bytes(head + b"{} loop\nshowpage\n")
    with pytest.raises(ImageReadError, match="not an image"):
        read_rgb(tmp_path / "x.jpg")


def bomb(file, width, height):
    """A PNG of one color that is small on disk."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    pack, row = zlib.compressobj(9), bytes(1 + width)
    rows = [pack.compress(row * 1000) for _ in range(height // 1000)]
    rows += [pack.compress(row * (height % 1000)), pack.flush()]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", b"".join(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (9000, 9000)])
def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch, size):
    bomb(tmp_path / "a.png", size[0], min(size[1], 2000))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    (tmp_path / "a.png").write_bytes(content)
    for door in (tmp_path / "a.png", bytes(content)):
        with pytest.raises(ImageReadError, match=r"pixels"):
            as_rgb(door)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    for number in range(6):
        bomb(tmp_path / f"{number}.png", 2100, 2000)
    original, active, most = reading._load, set(), []

    def load(image):
        active.add(threading.get_ident())
        time.sleep(0.02)
        most.append(len(active))
        original(image)
        active.discard(threading.get_ident())

    monkeypatch.setattr(reading, "_load", load)
    assert not reading.find_unreadable([str(tmp_path / f"{i}.png") for i in range(6)])
    assert most == [1] * 6
    for number in range(6):
        bomb(tmp_path / f"{number}.png", 21, 20)
    reading.find_unreadable([str(tmp_path / f"{i}.png") for i in range(6)])
    assert max(most) > 1  # small ones are not held up


def test_pipes_sockets_devices_and_sparse_files_are_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind("socket.jpg")
        (tmp_path / "device.jpg").symlink_to("/dev/zero")
        with open(tmp_path / "sparse.jpg", "wb") as stream:
            stream.truncate(2**40)
        monkeypatch.setattr(reading.os, "open", lambda *_: pytest.fail("opened"))
        for name in ("pipe.jpg", "socket.jpg", "device.jpg"):
            with pytest.raises(ImageReadError, match="not a file"):
                read_rgb(tmp_path / name)
        with pytest.raises(ImageReadError, match="1099511627776 bytes are more"):
            read_rgb(tmp_path / "sparse.jpg")


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.jpg")
    real, calls = os.stat, []
    (tmp_path / "b.jpg").write_bytes(b"x")

    def stat(path, **options):
        calls.append(path)
        return real(tmp_path / "b.jpg")

    monkeypatch.setattr(reading.os, "stat", stat)
    with pytest.raises(ImageReadError, match="not a file"):
        read_rgb(tmp_path / "a.jpg")
    assert calls


def test_decoding_ends_after_a_time(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=95)
    assert read_rgb(tmp_path / "a.jpg").size == (900, 900)
    monkeypatch.setattr(reading, "MAX_SECONDS", -1.0)
    with pytest.raises(ImageReadError, match=r"a\.jpg: decoding takes more than"):
        read_rgb(tmp_path / "a.jpg")


def test_an_uncompressed_image_is_bounded_by_its_size(tmp_path, monkeypatch):
    picture("RGB").save(tmp_path / "a.bmp")
    monkeypatch.setattr(reading, "MAX_BYTES", 100)
    with pytest.raises(ImageReadError, match=r"bytes are more than 100"):
        read_rgb(tmp_path / "a.bmp")


def test_names_in_messages_are_printable(tmp_path):
    file = tmp_path / "a\x1b[2J\n\udce9.jpg"
    file.write_bytes(b"")
    with pytest.raises(ImageReadError, match="empty file") as caught:
        read_rgb(file)
    assert str(caught.value).isprintable()
    assert r"a\x1b[2J\x0a\udce9.jpg" in str(caught.value)


def test_stream_of_a_bytes_image_is_closed():
    stream = io.BytesIO()
    picture("RGB").save(stream, "PNG")
    assert as_rgb(memoryview(stream.getvalue())).size == SIZE

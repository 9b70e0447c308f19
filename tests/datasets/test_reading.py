"""Real files of every type: each is read correctly, or refused with a reason."""

import errno
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.datasets import reading
from selcon_plugin.datasets.reading import ImageReadError, find_unreadable, read_rgb

COLOR = (200, 30, 40)


def write(path, image, **options):
    image.save(path, **options)
    return path


def plain(size=(6, 12), color=COLOR):
    return Image.new("RGB", size, color)


def pixels(path):
    image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- used correctly ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg", "a.tif", "a.JPEG"])
def test_colors_are_those_of_the_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (12, 6, 3), dtype=np.uint8)
    file = write(tmp_path / name, Image.fromarray(noise))
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(file), expected)


def test_palette_and_gray_and_one_bit(tmp_path):
    palette = write(
        tmp_path / "p.png", plain().convert("P", palette=Image.Palette.ADAPTIVE)
    )
    assert np.array_equal(pixels(palette), np.asarray(plain()))
    gray = write(tmp_path / "l.png", Image.new("L", (6, 12), 77))
    assert (pixels(gray) == 77).all()
    one_bit = write(tmp_path / "1.png", Image.new("1", (6, 12), 1))
    assert (pixels(one_bit) == 255).all()


def test_cmyk(tmp_path):
    file = write(tmp_path / "a.jpg", plain().convert("CMYK"), quality=100)
    assert np.abs(pixels(file).astype(int) - COLOR).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_upper_8_of_16_bits_are_kept(tmp_path, name):
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], dtype=np.uint16)
    file = write(tmp_path / name, Image.fromarray(values))
    assert pixels(file)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 0x12, 255)]


def test_16_bit_color(tmp_path):
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    assert pixels(tmp_path / "a.png").tolist() == [[[0x12, 0x80, 0xFF]]]


def test_transparency_is_black(tmp_path):
    half = Image.new("RGBA", (2, 1), (*COLOR, 255))
    half.putpixel((1, 0), (*COLOR, 0))
    assert pixels(write(tmp_path / "rgba.png", half)).tolist() == [[[*COLOR], [0, 0, 0]]]
    gray = Image.new("LA", (2, 1), (90, 255))
    gray.putpixel((1, 0), (90, 0))
    assert pixels(write(tmp_path / "la.png", gray)).tolist() == [[[90] * 3, [0] * 3]]
    keyed = Image.new("P", (2, 1), 0)
    keyed.putpalette([*COLOR, 9, 9, 9])
    keyed.putpixel((1, 0), 1)
    file = write(tmp_path / "p.png", keyed, transparency=b"\xff\x00")
    assert pixels(file).tolist() == [[[*COLOR], [0, 0, 0]]]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_rotation_is_used(tmp_path, name):
    image = plain((64, 32), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 32))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise for display
    rotated = pixels(write(tmp_path / name, image, exif=exif))
    assert rotated.shape == (64, 32, 3)
    assert rotated[4].mean() > 240  # the left side is the top now
    assert rotated[-4].mean() < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_matter(tmp_path):
    file = write(tmp_path / "a.jpg", plain(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert pixels(file).shape == (12, 6, 3)


def test_first_frame_of_an_animation(tmp_path):
    frames = [plain(color=(0, 0, 255))]
    write(tmp_path / "a.webp", plain(), save_all=True, append_images=frames, lossless=True)
    write(tmp_path / "a.gif", plain(), save_all=True, append_images=frames)
    for name in ("a.webp", "a.gif"):
        assert np.array_equal(pixels(tmp_path / name), np.asarray(plain()))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000)])
def test_smallest_and_widest(tmp_path, size):
    assert pixels(write(tmp_path / "a.png", plain(size))).shape == (*size[::-1], 3)


def test_name_need_not_match_the_type(tmp_path):
    write(tmp_path / "a.png", plain())
    os.rename(tmp_path / "a.png", tmp_path / "a.jpg")
    assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(plain()))


# --- refused -----------------------------------------------------------------------------


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (48, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format=path.suffix[1:].replace("jpg", "jpeg"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


REFUSED = {
    "empty.jpg": (lambda path: path.touch(), "empty file"),
    "text.jpg": (lambda path: path.write_text("no picture"), "not an image"),
    "header.jpg": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF"), ""),
    "header.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ""),
    "cut.jpg": (truncated, "truncated"),
    "cut.png": (truncated, ""),
    "cut.webp": (truncated, ""),
    "cut.bmp": (truncated, "truncated"),
    "folder.jpg": (lambda path: path.mkdir(), "not a file"),
    "pipe.jpg": (os.mkfifo, "not a file"),
    "link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
    "loop.jpg": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "gone.jpg": (lambda path: None, "No such file"),
    "float.tif": (lambda path: Image.new("F", (4, 4)).save(path), "no known white"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_path_and_reason(tmp_path, name):
    make, reason = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(ImageReadError) as caught:
        read_rgb(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert reason in str(caught.value)
    assert str(caught.value).count(name) == 1
    # The error can be pickled, so it reaches the training from loader processes.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_permission(tmp_path, monkeypatch):
    plain().save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):  # the superuser reads everything

        def refuse(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(reading.Image, "open", refuse)
    with pytest.raises(ImageReadError, match=r"a\.png: Permission denied"):
        read_rgb(tmp_path / "a.png")


def test_too_many_pixels_are_refused_without_decoding_them(tmp_path, monkeypatch):
    write(tmp_path / "a.png", plain((200, 100)))
    monkeypatch.setattr(reading, "MAX_PIXELS", 19_999)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageReadError, match="200 x 100 pixels are more than 19999"):
        read_rgb(tmp_path / "a.png")


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.png", plain((200, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageReadError, match="decompression bomb"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_faults_of_the_machine_are_not_the_images(tmp_path, monkeypatch, code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    plain().save(tmp_path / "a.png")
    monkeypatch.setattr(reading.Image, "open", fail)
    with pytest.raises(OSError, match=r".") as caught:
        read_rgb(tmp_path / "a.png")
    assert not isinstance(caught.value, ImageReadError)


# --- many at once ------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        plain().save(folder / f"{i:02}.png")
    (folder / "03.png").write_bytes(b"")
    (folder / "07.png").write_text("text")
    return [str(folder / f"{i:02}.png") for i in range(12)]


def test_broken_files_are_found_among_many_in_order(files):
    faults = find_unreadable(files)
    assert list(faults) == [files[3], files[7]]
    assert faults[files[3]] == f"{files[3]}: empty file"
    assert not find_unreadable([])


def test_good_files_are_not_decoded_again_while_they_are_the_same(
    files, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "_MIN_CACHED_FILES", 12)
    read = []
    fault_of = reading.fault_of
    monkeypatch.setattr(
        reading, "fault_of", lambda path: read.append(path) or fault_of(path)
    )

    def check():
        read.clear()
        return list(find_unreadable(files)), len(read)

    assert check() == ([files[3], files[7]], 12)
    assert check() == ([files[3], files[7]], 2)
    plain().save(files[3])  # fixed: another size, so all files are checked
    assert check() == ([files[7]], 12)
    with open(files[5], "r+b") as stream:  # the same size
        stream.write(b"\0" * 20)
    os.utime(files[5], ns=(1, 1))
    assert check() == ([files[5], files[7]], 12)
    for memory in (tmp_path / "cache/selcon_plugin/checked_images").iterdir():
        memory.write_text('{"not": "ours"}')
    assert check() == ([files[5], files[7]], 12)


def test_check_works_without_a_cache_folder(files, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(reading, "_MIN_CACHED_FILES", 12)
    assert len(find_unreadable(files)) == 2

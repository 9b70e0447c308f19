"""Arguments that a caller easily confuses: one path or a list, names of cameras, images."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.retrieval import Index, search


@pytest.fixture
def index(tmp_path, embedder, folder):
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder)
    return index


def found(results):
    return [[match.path for match in result.matches] for result in results]


def test_queries_in_every_form_are_the_same(tmp_path, monkeypatch, index, embedder, folder):
    files = sorted(folder.rglob("*.png"))[:3]
    right = found(search(index, files, embedder=embedder, top=5))
    contents = [file.read_bytes() for file in files]
    assert len(search(index, contents, embedder=embedder, top=5)) == 3
    forms = [
        [str(file) for file in files],
        tuple(files),
        (file for file in files),
        iter(files),
        np.array([str(file) for file in files]),
        dict.fromkeys(files),
    ]
    for form in forms:
        assert found(search(index, form, embedder=embedder, top=5)) == right
    monkeypatch.chdir(folder)
    relative = [file.relative_to(folder) for file in files]
    assert found(search(index, relative, embedder=embedder, top=5)) == right
    monkeypatch.chdir(tmp_path)
    assert found(search("index", files, embedder=embedder, top=5)) == right
    assert found(search(Path("index"), files, embedder=embedder, top=5)) == right
    assert search(index, [], embedder=embedder) == []


def test_images_in_memory_are_queries(index, embedder, folder):
    file = folder / "cam0/p0_0.png"
    image = Image.open(file)
    pixels = np.asarray(image)
    (first,), (second,) = (
        found(search(index, [image], embedder=embedder, top=5)),
        found(search(index, [pixels], embedder=embedder, top=5)),
    )
    assert first == second
    assert first[0] == str(file)  # in memory it is not known to be that file
    names = [r.query for r in search(index, [image, file, pixels], embedder=embedder)]
    assert names == ["query 1", str(file), "query 3"]


@pytest.mark.parametrize(
    "one",
    [
        lambda file: str(file),
        lambda file: Path(file),
        lambda file: os.fsencode(file),
        lambda file: Image.new("RGB", (4, 8)),
        lambda file: np.asarray(Image.open(file)),
        lambda file: None,
        lambda file: 3,
    ],
)
def test_one_query_without_a_list_is_named(index, embedder, folder, one):
    with pytest.raises(ValueError, match=r"queries must be a list.*pass \["):
        search(index, one(folder / "cam0/p0_0.png"), embedder=embedder)


def test_names_of_cameras_are_lists(index, embedder, folder):
    features = embedder([Image.open(folder / "cam0/p0_0.png")])
    for name in ("camera", "not_camera"):
        for wrong in ("cam1", 1, [1], [None], b"cam1", Path("cam1"), [["cam1"]]):
            with pytest.raises(ValueError, match=rf"^{name} must be a list"):
                index.search(features, **{name: wrong})
        for right in (["cam1"], ("cam1",), {"cam1"}, iter(["cam1"]), np.array(["cam1"])):
            cameras = {m.camera for m in index.search(features, **{name: right})[0]}
            assert cameras == ({"cam1"} if name == "camera" else {"cam0"})


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("top", (0, -1, 2.5, "3", None, True, float("nan"))),
        ("threshold", (float("nan"), float("inf"), 1.5, -2, "0.5", None, True)),
        ("leave_out", ("a.jpg", ["a.jpg", "b.jpg"], Path("a.jpg"))),
    ],
)
def test_numbers_are_checked(index, embedder, folder, option, values):
    features = embedder([Image.open(folder / "cam0/p0_0.png")])
    for value in values:
        with pytest.raises(ValueError, match=rf"^{option} must be"):
            index.search(features, **{option: value})


def test_folders_and_patterns_are_one_path(tmp_path, index, embedder, folder):
    for wrong in ([folder], None, 3, "", [str(folder)], b""):
        for use in (
            lambda wrong=wrong: index.add(wrong, embedder),
            lambda wrong=wrong: index.remove(wrong),
            lambda wrong=wrong: Index.open(wrong),
            lambda wrong=wrong: Index.create(wrong, embedder),
        ):
            with pytest.raises(ValueError, match="must be one path"):
                use()
    for batch_size in (0, 1.5, "4", True):
        with pytest.raises(ValueError, match="batch_size must be a whole number >= 1"):
            index.add(folder, embedder, batch_size=batch_size)
    assert index.remove(Path("p0_0.png")) == 1
    assert index.remove(folder / "cam0") == 11
    assert len(index) == 12


def test_embedders_without_a_dimension_are_refused(tmp_path, embedder):
    for dim in (None, 0, "24", 24.0, True):
        embedder.dim = dim
        with pytest.raises(ValueError, match="dim must be a whole number >= 1"):
            Index.create(tmp_path / "index", embedder)


def test_index_with_a_relative_folder_survives_a_change_of_folder(
    tmp_path, monkeypatch, embedder, folder
):
    monkeypatch.chdir(tmp_path)
    index = Index.create("mine", embedder)
    index.add("crops", embedder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(index) == len(Index.open(tmp_path / "mine")) == 24
    assert index.add(folder, embedder).known == 24

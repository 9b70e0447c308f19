"""Data sets of the hosts whose files are absent, misnamed or have odd lines."""

import shutil
from pathlib import Path

import pytest

from helpers.hosts import needs_fastreid, needs_torchreid
from helpers.network import message_of, nothing_left_open, refusing_server
from helpers.tiny import SPEC
from selcon_plugin.datasets import generate_synthetic_persons

MARKET = "Market-1501-v15.09.15"


@pytest.fixture(scope="session")
def persons(tmp_path_factory):
    return Path(generate_synthetic_persons(tmp_path_factory.mktemp("persons"), SPEC))


def fastreid_items(root, name, monkeypatch):
    monkeypatch.setenv("FASTREID_DATASETS", str(root))
    from selcon_plugin.fastreid_ext.datasets import build_dataset
    from selcon_plugin.hosts import get_host

    splits = ("train", "query", "gallery")
    data = build_dataset(get_host("fastreid").default_config(), name, splits=splits)
    return {split: getattr(data, split) for split in splits}


def torchreid_items(root, name, monkeypatch):
    from selcon_plugin.torchreid_ext.config import get_default_config
    from selcon_plugin.torchreid_ext.train import build_datamanager

    cfg = get_default_config()
    cfg.data.root, cfg.data.workers, cfg.train.batch_size = str(root), 0, 2
    cfg.data.sources = cfg.data.targets = [name.lower()]
    data = build_datamanager(cfg)
    tests = data.test_dataset[name.lower()]
    items = {"train": data.train_loader.dataset.train, **tests}
    return {split: [item[:3] for item in found] for split, found in items.items()}


@pytest.fixture(
    params=[
        pytest.param(fastreid_items, marks=needs_fastreid, id="fastreid"),
        pytest.param(torchreid_items, marks=needs_torchreid, id="torchreid"),
    ]
)
def read(request, tmp_path, monkeypatch):
    """Read a data set of either host below the root ``tmp_path``."""

    def items(name="Market1501"):
        return request.param(tmp_path, name, monkeypatch)

    items.root = tmp_path
    items.torchreid = request.param is torchreid_items
    return items


@pytest.fixture
def market(read, persons):
    folder = read.root / "market1501" / MARKET if read.torchreid else read.root / MARKET
    shutil.copytree(persons, folder)
    return folder


@pytest.fixture
def msmt17(read):
    """Return a folder of MSMT17 with three images in each list."""
    folder = read.root / "msmt17" if read.torchreid else read.root
    folder = folder / "MSMT17_V2"
    for split, part in (
        ("train", "train"),
        ("val", "train"),
        ("query", "test"),
        ("gallery", "test"),
    ):
        lines = []
        for person in range(3):
            name = f"{person:04}/{person:04}_000_{person + 1:02}_0303morning_{split}_0.jpg"
            file = folder / f"mask_{part}_v2" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
            lines.append(f"{name} {person}")
        (folder / f"list_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


# --- absent -------------------------------------------------------------------------------


@pytest.fixture
def download_from_server(monkeypatch):
    """Let torchreid ask a server that refuses for a data set that it downloads."""
    with refusing_server() as url:

        def at_server(name):
            from selcon_plugin.torchreid_ext.datasets import image_datasets

            cls = image_datasets()[name]
            if cls.dataset_url is not None:
                monkeypatch.setattr(cls, "dataset_url", f"{url}/{name}.zip")

        yield at_server


@pytest.mark.parametrize("name", ["MSMT17", "CUHK03", "DukeMTMC"])
def test_absent_data_set_is_named_with_folder_and_remedy(read, name, download_from_server):
    if read.torchreid:
        name = {"DukeMTMC": "dukemtmcreid"}.get(name, name)
        download_from_server(name.lower())
    with nothing_left_open():
        text = message_of(FileNotFoundError, read, name)
    assert "\n" not in text
    assert name.lower() in text.lower()
    assert str(read.root) in text
    assert ("data.root" if read.torchreid else "FASTREID_DATASETS") in text
    assert not any(read.root.iterdir()) or not read.torchreid


def test_missing_part_of_a_data_set_is_named(read, market):
    shutil.rmtree(market / "query")
    with pytest.raises(FileNotFoundError, match=r"Market1501 .*query"):
        read()


def test_missing_list_is_named(read, msmt17):
    (msmt17 / "list_query.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"MSMT17 .*list_query\.txt"):
        read("MSMT17")


def test_folder_without_images_is_named(read, market):
    for file in (market / "bounding_box_train").iterdir():
        file.unlink()
    with pytest.raises(
        (FileNotFoundError, ValueError), match=r"Market1501 .*no images in train"
    ):
        read()


# --- lists --------------------------------------------------------------------------------


def rewrite(file, change):
    file.write_bytes(change(file.read_text()).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\n\n"),
        lambda text: "\n  \n" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "  \t\n"),
        lambda text: text.replace(" ", "\t"),
        lambda text: text.replace(" ", "   "),
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n", "\r\n\r\n"),
    ],
    ids=[
        "blank",
        "first",
        "crlf",
        "trailing",
        "tab",
        "spaces",
        "bom",
        "last",
        "blank crlf",
    ],
)
def test_list_is_read_as_a_person_means_it(read, msmt17, change):
    expected = read("MSMT17")
    assert {split: len(items) for split, items in expected.items()} == dict.fromkeys(
        expected, 3
    )
    for file in msmt17.glob("list_*.txt"):
        rewrite(file, change)
    assert read("MSMT17") == expected


@pytest.mark.parametrize(
    "line",
    [
        "0000/0000_000_01_a.jpg",
        "one.jpg 1",
        "0000/0000_000_xx_a.jpg 3",
        "a_b_01_c.jpg x",
        "# 3",
    ],
)
def test_wrong_line_is_named_by_file_and_number(read, msmt17, line):
    rewrite(msmt17 / "list_train.txt", lambda text: f"\n{text}{line}\n{text}")
    with pytest.raises(ValueError, match=r"MSMT17 .*list_train\.txt, line 5") as caught:
        read("MSMT17")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_are_no_utf8_are_read(read, msmt17):
    file = msmt17 / "list_train.txt"
    file.write_bytes(file.read_bytes() + b"\xe9t\xe9/0001_000_01_a.jpg 5\n")
    assert [path for path, *_ in read("MSMT17")["train"]][-1].endswith(
        "\udce9t\udce9/0001_000_01_a.jpg"
    )


def test_lists_of_another_place_are_named(read, msmt17):
    shutil.move(msmt17 / "mask_train_v2" / "0000", msmt17 / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"(?i)MSMT17 .*0000_000_01.*removed"):
        read("MSMT17")


# --- names of files -----------------------------------------------------------------------


@pytest.mark.parametrize("split", ["bounding_box_train", "query", "bounding_box_test"])
def test_misnamed_file_is_named(read, market, split):
    source = next((market / "query").glob("*.jpg"))
    for name in ("cover.jpg", "IMG_0001.jpg"):
        shutil.copy(source, market / split / name)
    with pytest.raises(
        ValueError, match=r"Market1501 .*IMG_0001\.jpg and 1 others"
    ) as caught:
        read()
    assert str(market / split) in str(caught.value)


def test_folders_above_the_images_are_not_parsed(read, market):
    expected = read()
    place = read.root / "0007_c3" / "0008_c4_set"
    for folder in [path for path in read.root.iterdir() if path.name != "0007_c3"]:
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, place)
    read.root = place

    from unittest import mock

    patch = mock.patch.dict("os.environ", FASTREID_DATASETS=str(place))
    with patch, pytest.MonkeyPatch.context() as monkeypatch:
        items = torchreid_items if read.torchreid else fastreid_items
        found = items(place, "Market1501", monkeypatch)
    for split in expected:
        assert sorted(i[1:] for i in map(tuple, found[split])) == sorted(
            i[1:] for i in map(tuple, expected[split])
        )


@pytest.mark.parametrize(
    ("name", "named"),
    [("0001_c9s1_000001_01.jpg", "camid"), ("2000_c1s1_000001_01.jpg", "pid")],
)
def test_number_that_the_data_set_refuses_is_named(read, market, name, named):
    source = next((market / "query").glob("*.jpg"))
    shutil.copy(source, market / "bounding_box_train" / name)
    with pytest.raises(ValueError, match=rf"Market1501 .*{name}: .*{named} = "):
        read()


def test_images_with_another_suffix_are_counted(read, market, caplog):
    files = sorted((market / "bounding_box_train").glob("*.jpg"))
    for file in files[:3]:
        file.rename(file.with_suffix(".JPG"))
    (market / "bounding_box_train" / "Thumbs.db").write_bytes(b"")
    assert len(read()["train"]) == len(files) - 3
    assert "3 image files in" in caplog.text
    assert "*.jpg only" in caplog.text


@needs_fastreid
def test_other_lists_of_fastreid(tmp_path, monkeypatch):
    folder = tmp_path / "VERI-Wild" / "train_test_split"
    folder.mkdir(parents=True)
    (tmp_path / "VERI-Wild" / "images" / "00001").mkdir(parents=True)
    info = ["id/image;Camera ID;Time;Model;Type;Color"] + [
        f"00001/00000{number};{number};2018;;;" for number in (1, 2, 3)
    ]
    (folder / "vehicle_info.txt").write_text("\r\n\r\n".join(info) + "\r\n")
    for name in ("train_list", "test_10000_query", "test_10000"):
        (folder / f"{name}.txt").write_text("\n00001/000001.jpg\n\n00001/000002.jpg \n")
    found = fastreid_items(tmp_path, "VeRiWild", monkeypatch)
    assert [items[1] for items in found["query"]] == [1, 1]
    (folder / "train_list.txt").write_text("00001/000001.jpg\n\n00001/000009.jpg\n")
    with pytest.raises(ValueError, match=r"VeRiWild .*train_list\.txt, line 3.*000009"):
        fastreid_items(tmp_path, "VeRiWild", monkeypatch)


@needs_fastreid
def test_broken_json_is_named(read, monkeypatch):
    pytest.importorskip("h5py")
    folder = read.root / "cuhk03"
    (folder / "cuhk03_release").mkdir(parents=True)
    for name in ("images_detected", "images_labeled"):
        (folder / name).mkdir()
    for name in ("cuhk03_release/cuhk-03.mat",):
        (folder / name).write_bytes(b"")
    for kind in ("detected", "labeled"):
        (folder / f"cuhk03_new_protocol_config_{kind}.mat").write_bytes(b"")
        for split in ("classic", "new"):
            (folder / f"splits_{split}_{kind}.json").write_text('[{"train": [}]')
    with pytest.raises(ValueError, match=r"CUHK03 .*splits_new_\w+\.json"):
        read("CUHK03")
    for file in folder.glob("*.json"):
        file.write_text('[{"train": [["x.jpg", 1]], "query": [], "gallery": []}]')
    with pytest.raises((ValueError, FileNotFoundError), match=r"CUHK03 "):
        read("CUHK03")

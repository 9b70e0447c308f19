"""One text means the same in a file, on a command line and from Python, in both hosts."""

import importlib.util

import pytest

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.files import builtin_configs, copy_builtin_config
from selcon_plugin.hosts import get_host, host_names, host_of, load_config

REFUSED = object()
HOSTS = [name for name in host_names() if importlib.util.find_spec(name)]
# Keys of each type: whole number, number, switch, text, list, number or a word.
KEYS = {
    "fastreid": {
        int: "SOLVER.MAX_EPOCH",
        float: "SOLVER.BASE_LR",
        bool: "SOLVER.NESTEROV",
        str: "OUTPUT_DIR",
        list: "SOLVER.STEPS",
        "eps": "MODEL.SELCON.CLUSTERING.EPS",
    },
    "torchreid": {
        int: "train.max_epoch",
        float: "train.lr",
        bool: "train.staged_lr",
        str: "data.save_dir",
        list: "train.stepsize",
        "eps": "selcon.clustering.eps",
    },
}
METHODS = {
    "fastreid": ["MODEL.DEVICE", "cpu", "MODEL.SELCON.METHOD", "ClusterContrast"],
    "torchreid": ["use_gpu", "no", "selcon.method", "ClusterContrast"],
}
CASES = [
    (int, "010", 10),
    (int, "1_000", 1000),
    (int, "1:30", REFUSED),
    (int, "yes", REFUSED),
    (int, "1.5", REFUSED),
    (float, "5e-1", 0.5),
    (float, "1", 1.0),
    (float, "1e999", REFUSED),
    (float, "0,5", REFUSED),
    (bool, "yes", True),
    (bool, "off", False),
    (bool, "1", REFUSED),
    (str, "20240131", "20240131"),
    (str, "2024-01-31", "2024-01-31"),
    (str, "on", "on"),
    (str, "010", "010"),
    (list, "[20, 040,]", [20, 40]),
    (list, "(20,)", [20]),
    (list, "20", REFUSED),
    (list, "[a]", REFUSED),
    ("eps", "auto", "auto"),
    ("eps", "5e-1", 0.5),
    ("eps", "null", 0.6),
    ("eps", "often", REFUSED),
]


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param


def from_file(host, key, text, folder):
    file = folder / "c.yml"
    *nodes, name = key.split(".")
    lines = [f"{'  ' * depth}{node}:" for depth, node in enumerate(nodes)]
    lines.append(f"{'  ' * len(nodes)}{name}: {text}")
    file.write_text("\n".join(lines) + "\n")
    return load_config(str(file), METHODS[host], host=host)


def from_key_with_dots(host, key, text, folder):
    file = folder / "c.yml"
    file.write_text(f"{key}: {text}\n")
    return load_config(str(file), METHODS[host], host=host)


def from_command_line(host, key, text, folder):
    return load_config("", [*METHODS[host], key, text], host=host)


def from_python(host, key, text, folder):
    return get_host(host).load_config(options=METHODS[host], overrides={key: text})


DOORS = (from_file, from_key_with_dots, from_command_line, from_python)


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_value_or_refusal(kind, text, expected, host, tmp_path):
    key = KEYS[host][kind]
    for door in DOORS:
        if expected is REFUSED:
            with pytest.raises(ValueError, match=key.replace(".", r"\.")) as caught:
                door(host, key, text, tmp_path)
            assert text.strip("[]()") in str(caught.value)
            if "c.yml" in str(caught.value):
                assert ", line " in str(caught.value)
        else:
            found = flatten_config(door(host, key, text, tmp_path))[key]
            assert found == expected, door
            assert type(found) is type(expected), door


def test_range_errors_name_file_and_line_too(host, tmp_path):
    key = KEYS[host][int]
    with pytest.raises(ValueError, match=r"c\.yml, line 2: .*>= 1.*got 0"):
        from_file(host, key, "0", tmp_path)
    with pytest.raises(ValueError, match=f"^{key}.*>= 1.*got 0"):
        from_command_line(host, key, "0", tmp_path)


def test_last_of_two_values_on_a_command_line_is_used_and_told(host, caplog):
    key = KEYS[host][int]
    cfg = load_config("", [*METHODS[host], key, "3", key, "4"], host=host)
    assert flatten_config(cfg)[key] == 4
    assert f"{key} is given twice, 3 and 4" in caplog.text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["{int}", "3", "--resume"], "--resume; before; {int}"),
        (["--hurry", "3"], "no option --hurry"),
        (["{int}"], "{int}; no value"),
        (["{swapped}", "3"], "{swapped}; did you mean {int}?"),
        (["{int}.X", "3"], "{int}; not a group"),
        (["{group}", "3"], "{group}; group of keys; such as {group}."),
        (["_BASE_", "x"], "_BASE_"),
    ],
)
def test_command_lines_that_are_refused(options, parts, host):
    key = KEYS[host][int]
    names = {"int": key, "swapped": key.swapcase(), "group": key.partition(".")[0]}
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_config("", [word.format(**names) for word in options], host=host)
    for part in parts.format(**names).split("; "):
        assert part in str(caught.value)


def test_group_without_keys_changes_nothing(host, tmp_path):
    node = KEYS[host][int].partition(".")[0]
    file = tmp_path / "c.yml"
    file.write_text(f"{node}:\n  # {KEYS[host][int]}\n")
    load_config(str(file), METHODS[host], host=host)
    for content in (f"{node}: 3\n", f"{node}: null\n", f"{node}:\n  max_epoch:3\n"):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"c\.yml, line 1: {node} is a group"):
            load_config(str(file), METHODS[host], host=host)


def test_both_spellings_of_a_key_in_one_file(host, tmp_path):
    names = ["MODEL.SELCON.MAX_BAD_SHARE", "MODEL.SELCON.MAX_UNREADABLE_RATIO"]
    if host == "torchreid":
        names = ["selcon.max_bad_share", "selcon.max_unreadable_ratio"]
    file = tmp_path / "c.yml"
    file.write_text(f"{names[0]}: 0.1\n{names[1]}: 0.1\n")
    with pytest.raises(ValueError, match=r"line 1: .*two names of one option"):
        load_config(str(file), METHODS[host], host=host)
    base = tmp_path / "base.yml"
    base.write_text(f"{names[0]}: 0.1\n")
    file.write_text(f"_BASE_: base.yml\n{names[1]}: 0.2\n")
    cfg = load_config(str(file), METHODS[host], host=host)
    assert flatten_config(cfg)[names[1]] == 0.2


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("_BASE_: c.yml\n", "_BASE_; line 1; leads back"),
        ("_BASE_: [a.yml]\n", "_BASE_; line 1; one file"),
        ("_BASE_:\n", "_BASE_; line 1; one file"),
        ("_BASE_: no.yml\n", "_BASE_; line 1; no.yml; does not exist"),
        ("_BASE_: .\n", "_BASE_; line 1; folder"),
    ],
)
def test_bases_that_are_refused(content, parts, tmp_path):
    file = tmp_path / "c.yml"
    file.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"c\.yml") as caught:
        host_of(str(file))
    assert all(part in str(caught.value) for part in parts.split("; "))


# --- configs of the package ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["SyntheticPersons/scl.yml", "configs/image_folder.yml"])
def test_configs_of_the_package_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "fastreid" in HOSTS:
        assert (
            load_config(name, ["MODEL.DEVICE", "cpu"]).MODEL.META_ARCHITECTURE == "SelCon"
        )
    # A file of the user comes first.
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("data: {height: 3}\n")
    assert host_of(name) == "torchreid"


def test_unknown_config_names_similar_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"did you mean .*SyntheticPersons/scl\.yml"
    ):
        host_of("SyntheticPerson/scl.yml")


def test_copies_come_with_their_bases(tmp_path):
    files = copy_builtin_config("SyntheticPersons/scl.yml", tmp_path / "mine")
    assert [file.name for file in files] == ["scl.yml", "base.yml"]
    assert host_of(str(files[0])) == "fastreid"
    copy_builtin_config("SyntheticPersons/scl.yml", tmp_path / "mine")  # the same again
    files[1].write_text("MODEL: {}\n")
    with pytest.raises(FileExistsError, match=r"base\.yml exists"):
        copy_builtin_config("SyntheticPersons/scl.yml", tmp_path / "mine")
    assert files[1].read_text() == "MODEL: {}\n"
    assert "Market1501/spcl_R50.yml" in builtin_configs()

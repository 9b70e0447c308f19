"""YAML files as they are written: lines, keys set twice, and what is no config."""

import pytest

from selcon_plugin.io.plain_yaml import Group, read_yaml, read_yaml_values
from selcon_plugin.values import Written

BOMB = "a0: &a0 [1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)

# Content, then parts of the message, in addition to the file.
REFUSED = [
    ("", "empty"),
    ("# nothing\n", "empty"),
    ("---\n", "empty"),
    ("- a\n- b\n", "KEY: value"),
    ("hello\n", "KEY: value"),
    ("A:3\n", "space after the colon"),
    ("A: 1\nB: 2\nA: 3\n", "line 3; A is set a second time; line 1"),
    ("A: 1\n'A': 3\n", "line 2; A is set a second time; line 1"),
    ("S:\n  A: 1\nT: 2\nS:\n  B: 1\n", "line 4; S is set a second time; line 1"),
    ("S.A: 1\nS:\n  A: 2\n", "line 3; S.A is set a second time; line 1"),
    ("S:\n  A: 2\nS.A: 1\n", "line 3; S.A is set a second time; line 2"),
    ("S.A.B: 1\nS:\n  A: {B: 2}\n", "line 3; S.A.B is set a second time; line 1"),
    ("S.A: 1\nS.A: 1\n", "line 2; S.A is set a second time; line 1"),
    ("S: 1\nS.A: 1\n", "line 2; S.A is set a second time; line 1"),
    ("S:\n\tA: 1\n", "line 2; tab"),
    ("A: 1\n---\nB: 2\n", "line 2; several documents"),
    ("A: [1\nB: 2\n", "line 2"),
    ("A: 'x\n", "line 2"),
    ("A: b: c\n", "line 1"),
    ("A: *x\n", "line 1; alias 'x'"),
    ("S: &s\n  A: *s\n", "line 1; alias; its own group"),
    ("S: &s [1, *s]\n", "line 1; alias; its own group"),
    ("S: &s\n  <<: *s\n", "line 1; alias; its own group"),
    (BOMB, "20,000 values"),
    ("[" * 3000, "nested"),
    ("{a: " * 3000, "nested"),
    ("A: !!python/object/apply:os.system ['true']\n", "line 1; tag; remove"),
    ("A: !!python/tuple [1]\n", "line 1; tag"),
    ("A: !!binary aGk=\n", "line 1; tag"),
    ("A: !mine 3\n", "line 1; tag"),
    ("!!set {A}\n", "line 1; tag"),
    ("? [a]\n: 3\n", "line 1; a name"),
    ("'': 3\n", "line 1; a name"),
    ("A.: 3\n", "line 1; 'A.'"),
    ("A: [{B: 1}]\n", "line 1; list"),
    ("<<: 3\nA: 1\n", "line 1; <<; group"),
    ("A: 1\nB: \0\n", "line 2; '\\x00'"),
    (b"A: 1\nB: na\xefve\n", "line 2; UTF-8"),
    (b"\xff\xfeA", "UTF-8"),
    (b"\x80\x02}q\x00.", "line 1; UTF-8"),
]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "c.yml"


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(("content", "parts"), REFUSED, ids=range(len(REFUSED)))
def test_refusal_names_file_key_and_line(content, parts, file):
    with pytest.raises(ValueError, match=r"c\.yml") as caught:
        read_yaml(write(file, content))
    message = str(caught.value)
    assert all(part in message for part in parts.split("; ")), message
    assert "\n" not in message


def test_texts_keep_their_form_quotes_and_lines(file):
    content = "A: 010\nB: '010'\nC:\n  D: |\n    logs\n  E: !!str 5\nF: [1e-3, \"x\"]\nG:\n"
    found = read_yaml(write(file, content)).entries
    inner = found["C"].value
    assert isinstance(inner, Group)
    assert found["A"].value == Written("010", False, 1)
    assert found["B"].value == Written("010", True, 2)
    assert inner.entries["D"].value.text == "logs"
    assert inner.entries["E"].value == Written("5", True, 6)
    assert found["F"].value == [Written("1e-3", False, 7), Written("x", True, 7)]
    assert found["G"].value == Written("", False, 8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(encoding, file):
    write(file, "A: naïve\r\nB: 2\r\n".encode(encoding))
    assert read_yaml_values(file) == {"A": "naïve", "B": 2}


def test_keys_with_dots_are_the_nested_ones(file):
    write(file, "S:\n  A: 1\nS.B.C: 2\nS.B: {D: 3}\n")
    assert read_yaml_values(file) == {"S": {"A": 1, "B": {"C": 2, "D": 3}}}


def test_merge_keys_give_way_to_the_groups_own(file):
    write(file, "S: &s {A: 1, B: 2}\nT:\n  B: 3\n  <<: *s\nU: {<<: [{A: 5}, *s]}\n")
    found = read_yaml_values(file)
    assert found["T"] == {"A": 1, "B": 3}
    assert found["U"] == {"A": 5, "B": 2}


def test_values_by_their_form(file):
    write(file, "A: 1.0e-05\nB: null\nC: 'yes'\nD: [1, true, x]\nE: 2024-01-31\nF: on\n")
    expected = {"A": 1e-5, "B": None, "C": "yes", "D": [1, True, "x"]}
    assert read_yaml_values(file) == {**expected, "E": "2024-01-31", "F": "on"}

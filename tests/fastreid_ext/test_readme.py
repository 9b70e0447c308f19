"""The code of README.md runs as it stands."""

import re
from pathlib import Path

import pytest
import yaml

from selcon_plugin.cli import main

ROOT = Path(__file__).parents[2]


def nested(values):
    tree = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = list(value) if isinstance(value, tuple) else value
    return tree


def code_in(section):
    """The Python code of a section of the README, which is one block."""
    text = (ROOT / "README.md").read_text().partition(f"## {section}\n")[2]
    blocks = re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_script_runs_with_a_config_of_one_line_more(tiny_values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = nested(tiny_values | {"OUTPUT_DIR": "out"})
    Path("my_config.yml").write_text(yaml.safe_dump(config))
    exec(compile(code_in("I use FastReID"), "README.md", "exec"), {})
    assert Path("out/model_final.pth").exists()


def test_torchreid_script_runs_as_it_stands(tmp_path, monkeypatch):
    pytest.importorskip("torchreid")
    code = code_in("I use torchreid")
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    for long, short in (
        ("max_epoch=20", "max_epoch=1"),
        ("width=64", "width=64, workers=0"),
    ):
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "README.md", "exec"), {})
    assert Path("logs/osnet/model/model.pth.tar-1").exists()


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_commands_named_exist(capsys):
    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"^selcon (\w+)  +\S", text, re.MULTILINE)
    main(["--help"])
    known = re.findall(r"^  (\w+)  +\S", capsys.readouterr().out, re.MULTILINE)
    assert listed == known


def test_make_targets_named_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make (\w+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets

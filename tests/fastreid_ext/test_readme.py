"""The code of README.md runs as it stands."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from helpers.programs import run_program
from selcon_plugin.cli.main import main
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.hosts import load_config
from selcon_plugin.methods import method_class, method_names

ROOT = Path(__file__).parents[2]
# As many as fill a batch of torchreid's, which has 32.
SPEC = SyntheticPersonsSpec(num_train_ids=10, num_test_ids=4, images_per_id=8)


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
    from selcon_plugin.torchreid_ext import register_synthetic_persons

    register_synthetic_persons("few-of-readme", SPEC)
    for long, short in (
        ("max_epoch=20", "max_epoch=1"),
        ("width=64", "width=64, workers=0"),
        ('"syntheticpersons"', '"few-of-readme"'),
    ):
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "README.md", "exec"), {})
    assert Path("logs/osnet/model/model.pth.tar-1").exists()


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]
    for page in [*pages, *ROOT.glob("docs/**/*.md")]:
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


def test_worked_example_of_a_method_trains(tiny_values, tmp_path, monkeypatch):
    text = (ROOT / "docs/add_a_method.md").read_text()
    code, settings = (
        re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]
        for language in ("python", "yaml")
    )
    lines = [line for line in (code + settings).splitlines() if line]
    assert len(lines) < 60
    monkeypatch.chdir(tmp_path)
    Path("margin_contrast.py").write_text(code)
    own = {key: value for key, value in tiny_values.items() if "SELCON" not in key}
    own |= {"MODEL.SELCON.CLUSTERING.EPS": 0.7, "MODEL.SELCON.CLUSTERING.MIN_SAMPLES": 2}
    own |= {"MODEL.SELCON.CLUSTERING.K1": 8, "OUTPUT_DIR": "out"}
    Path("configs/SyntheticPersons").mkdir(parents=True)
    Path("configs/SyntheticPersons/base.yml").write_text(yaml.safe_dump(nested(own)))
    Path("margin_contrast.yml").write_text(settings)
    # In a process of its own: what it registers stays there.
    command = re.search(r"^selcon (train .*)$", text, re.MULTILINE)[1].split()
    done = run_program("-m", "selcon_plugin", *command)
    assert done.returncode == 0, done.stderr
    results = yaml.safe_load(Path("out/results.json").read_text())
    assert results["method"] == "MarginContrast"
    assert results["metrics"]["SyntheticPersons"]["mAP"] > 0


def test_every_method_has_a_row_with_file_config_page_and_paper():
    table = (ROOT / "README.md").read_text().partition("<!-- methods: begin -->")[2]
    rows = table.partition("<!-- methods: end -->")[0].strip().splitlines()[2:]
    listed = []
    for row in rows:
        name = re.search(r"`(\w+)`", row)[1]
        listed.append(name)
        file, config, page = re.findall(r"\]\((?!http)([^)]+)\)", row)
        assert Path(inspect.getfile(method_class(name))) == ROOT / file
        assert name == load_config(str(ROOT / config)).MODEL.SELCON.METHOD
        assert Path(file).stem == Path(page).stem
        # It is this package's own combination, and no paper has it.
        assert "](http" in row or name == "SelConCluster"
        assert re.search(r"\d+\.\d ± \d+\.\d", row)
    assert sorted(listed) == method_names()

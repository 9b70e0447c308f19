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


def code_in(page, section, language="python"):
    """The first block of code of one language below a heading of a page."""
    text = re.split(
        rf"^#+ {re.escape(section)}$", (ROOT / page).read_text(), flags=re.MULTILINE
    )[1]
    text = re.split(r"^#+ ", text, flags=re.MULTILINE)[0] if language != "bash" else text
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[0]


def lines_of(code):
    return [line for line in code.splitlines() if line]


def test_quick_starts_are_short():
    text = (ROOT / "README.md").read_text().partition("## Quick start\n")[2]
    blocks = re.findall(r"```\w+\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    assert len(blocks) == 5
    assert all(len(lines_of(block)) <= 6 for block in blocks)


def test_line_of_config_makes_a_config_train_without_labels(
    tiny_values, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    own = {
        key: value for key, value in tiny_values.items() if key != "MODEL.META_ARCHITECTURE"
    }
    config = nested(own | {"OUTPUT_DIR": "logs/mine"})
    config["MODEL"] |= yaml.safe_load(code_in("README.md", "FastReID", "yaml"))["MODEL"]
    Path("my_config.yml").write_text(yaml.safe_dump(config))
    for command in lines_of(code_in("README.md", "FastReID", "bash")):
        program, *arguments = command.split()
        assert program == "selcon"
        done = run_program("-m", "selcon_plugin", *arguments)
        assert done.returncode == 0, done.stderr
    assert Path("logs/mine/model_final.pth").exists()


def test_script_runs_with_a_config_of_one_line_more(tiny_values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = nested(tiny_values | {"OUTPUT_DIR": "out"})
    Path("my_config.yml").write_text(yaml.safe_dump(config))
    code = code_in("docs/fastreid.md", "In your own script")
    exec(compile(code, "docs/fastreid.md", "exec"), {})
    assert Path("out/model_final.pth").exists()


@pytest.mark.parametrize(
    ("page", "section"),
    [("README.md", "torchreid"), ("docs/torchreid.md", "In your own script")],
)
def test_torchreid_script_runs_as_it_stands(page, section, tmp_path, monkeypatch):
    pytest.importorskip("torchreid")
    code = code_in(page, section)
    monkeypatch.chdir(tmp_path)
    from selcon_plugin.torchreid_ext import register_synthetic_persons

    few = f"few-of-{Path(page).stem.lower()}"
    register_synthetic_persons(few, SPEC)
    for long, short in (
        ("max_epoch=20", "max_epoch=1"),
        ("width=64", "width=64, workers=0"),
        ('"syntheticpersons"', f'"{few}"'),
    ):
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, page, "exec"), {})
    assert Path("logs/osnet/model/model.pth.tar-1").exists()


def test_python_quick_start_is_that_of_the_page():
    code = code_in("README.md", "Python")
    compile(code, "README.md", "exec")
    page = (ROOT / "docs/python.md").read_text()  # tests/workflows/test_fit.py runs it
    for call in re.findall(r"selcon_plugin\.[\w.]+\(", code):
        assert call in page


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
    results = yaml.safe_load(
        (ROOT / "docs/benchmarks/results/synthetic_persons.yml").read_text()
    )
    rows = results["tables"]["methods"]["rows"]
    for row in rows:
        name = row["id"]
        page = ROOT / re.search(r"\((docs/.*?)\)", row["method"])[1]
        config = ROOT / re.search(r"\((configs/.*?)\)", row["config"])[1]
        file = Path(inspect.getfile(method_class(name)))
        assert file.stem == page.stem
        assert page.exists()
        assert name == load_config(str(config)).MODEL.SELCON.METHOD
        # It is this package's own combination, and no paper has it.
        assert row["paper"] or name == "SelConCluster"
        assert len(row["mAP"]) == len(row["Rank-1"]) == 2
    assert sorted(row["id"] for row in rows) == method_names()


def test_families_of_the_readme_name_every_method_and_paper():
    text = (
        (ROOT / "README.md").read_text().partition("## Methods\n")[2].partition("\n## ")[0]
    )
    results = yaml.safe_load(
        (ROOT / "docs/benchmarks/results/synthetic_persons.yml").read_text()
    )
    for row in results["tables"]["methods"]["rows"]:
        if row["paper"]:
            assert re.search(r"\((http.*)\)$", row["paper"])[1] in text
    assert "SelConCluster" in text

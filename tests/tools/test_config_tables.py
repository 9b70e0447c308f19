"""The tables of config keys in configs/README.md match the code."""

import importlib.util
import sys
from pathlib import Path

import pytest

from selcon_plugin.clustering import labeler_names, labeler_options
from selcon_plugin.config.keys import clustering_options, own_method_options
from selcon_plugin.methods import method_class, method_names

# Not imported here: the hosts must be patched first.
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(host) for host in ("fastreid", "torchreid")),
    reason="the tables are of both hosts",
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    file = ROOT / "tools" / "config_tables.py"
    spec = importlib.util.spec_from_file_location("config_tables", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(tool):
    for page, text in tool.pages().items():
        assert page.read_text() == text, f"{page} is stale: python tools/config_tables.py"


def test_every_key_of_a_method_is_in_its_table_or_in_that_of_its_base(tool):
    tables = tool.key_tables()
    for name in method_names():
        options = own_method_options(name)
        cls = method_class(name)
        bases = [n for n in method_names() if n != name and method_class(n) in cls.__mro__]
        rows = "".join(tables[f"method {n}"] for n in [name, *bases])
        for option in options.values():
            row = f"| `{option.name.upper()}` | {option.default} | "
            assert f"{row}{option.describe_legal()} | {option.meaning} |" in rows, row
    for name in labeler_names():
        for option in labeler_options(name).values():
            assert f"| `{option.name.upper()}` | " in tables[f"labeler {name}"]
    for option in clustering_options().values():
        assert f"| `{option.name.upper()}` | " in tables["clustering"]


def test_check_reports_the_stale_page(tool, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["config_tables.py", "--check"])
    assert tool.main() == 0
    page = tmp_path / "page.md"
    page.write_text("old")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "pages", lambda: {page: "new"})
    assert tool.main() == 1
    assert "page.md is stale" in capsys.readouterr().out
    assert page.read_text() == "old"
    monkeypatch.setattr(sys, "argv", ["config_tables.py"])
    assert tool.main() == 0
    assert page.read_text() == "new"

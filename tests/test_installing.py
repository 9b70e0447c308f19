"""The commands that messages name to install something: each must work as it stands."""

import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

import pytest

from helpers.hosts import ROOT
from selcon_plugin import compat, installing
from selcon_plugin.cli import doctor

METADATA = [
    "numpy>=1.24",
    'onnx>=1.15; extra == "export"',
    'onnxruntime>=1.17 ; extra == "export"',
    'faiss-cpu<2,>=1.7.3; extra == "search"',
    'h5py; python_version >= "3.10" and extra == "torchreid-deps"',
    "six; extra == 'torchreid-deps'",
]


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("export", ["onnx>=1.15", "onnxruntime>=1.17"]),
        ("search", ["faiss-cpu<2,>=1.7.3"]),
        ("torchreid-deps", ["h5py", "six"]),
        ("torchreid_deps", ["h5py", "six"]),
        ("expor", []),
    ],
)
def test_command_names_the_packages_of_an_extra(monkeypatch, extra, packages):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)
    assert installing.requirements_of(extra) == packages
    command = shlex.split(installing.install_command(extra))
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[4:] == (packages or [f"{ROOT}[{extra}]"])


@pytest.mark.parametrize("error", [importlib.metadata.PackageNotFoundError, None])
def test_command_installs_from_the_checkout_where_there_is_no_metadata(monkeypatch, error):
    def requires(_name):
        if error:
            raise error("selcon_plugin")

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert shlex.split(installing.install_command("export"))[-1] == f"{ROOT}[export]"
    assert (ROOT / "setup.py").is_file()


def test_command_of_a_python_in_a_folder_with_spaces(monkeypatch):
    monkeypatch.setattr(sys, "executable", "C:\\Program Files\\Python\\python.exe")
    assert installing.pip_install("timm") == (
        '"C:\\Program Files\\Python\\python.exe" -m pip install timm'
    )


def texts():
    for folder, pattern in (
        (ROOT / "selcon_plugin", "*.py"),
        (ROOT / "docs", "*.md"),
        (ROOT / "configs", "*.*"),
        (ROOT, "*.md"),
    ):
        yield from folder.rglob(pattern) if folder != ROOT else folder.glob(pattern)


def test_no_text_installs_the_package_by_name_from_a_registry():
    """It is on none: a command names a checkout, or the packages themselves."""
    named = re.compile(r"pip install [^\n`]*selcon[_-]plugin(\[|\b(?![\w./-]))")
    found = [path.name for path in texts() if named.search(path.read_text("utf-8"))]
    # Its docstring tells why.
    assert set(found) - {"CHANGELOG.md", "changelog.md"} == {"installing.py"}


@pytest.fixture
def metadata(monkeypatch):
    """Metadata of an installation; the tests also run where there is none."""
    lines = [*METADATA, 'tensorboard; extra == "fastreid-deps"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)


def test_module_that_fastreid_misses_is_named_with_all_that_it_needs(metadata):
    def use():
        with compat.shared.naming_what_is_missing("fastreid"):
            raise ModuleNotFoundError("No module named 'yacs'", name="yacs")

    with pytest.raises(compat.HostNeedsError, match=r"fastreid needs .* yacs") as got:
        use()
    assert "tensorboard" in str(got.value)
    check = doctor.run_check("FastReID", use, True)
    assert check.detail == "fastreid needs the module yacs, which is not installed"
    assert check.remedy.endswith("pip install yacs")


def test_missing_torchreid_names_what_it_needs(metadata):
    error = compat.HostMissingError("torchreid", compat.TORCHREID_INSTALL)
    assert compat.TORCHREID_INSTALL in str(error)
    assert "h5py" in str(error)
    assert Path(sys.executable).name in str(error)

"""torchvision of any layout: operators are declared only after it failed without them."""

import importlib
import subprocess
import sys
import types

import pytest
import torch

from helpers.hosts import ROOT
from selcon_plugin import compat
from selcon_plugin.cli import doctor
from selcon_plugin.config.importing import import_files

MISSING = "raise RuntimeError('operator torchvision::{} does not exist')"


class Operators:
    """Replacement of ``torch.library.Library`` and of ``torch.ops.torchvision``."""

    declared: dict  # name to schema, of the operators that exist

    def __init__(self, namespace="torchvision", kind="FRAGMENT"):
        assert (namespace, kind) == ("torchvision", "FRAGMENT")

    def define(self, schema):
        name = schema.partition("(")[0]
        assert name not in self.declared, "torchvision 0.29 ends the process here"
        self.declared[name] = schema

    def __getattr__(self, name):
        if name in self.declared:
            return self.declared[name]
        raise AttributeError(name)


@pytest.fixture
def operators(monkeypatch):
    Operators.declared = {}
    monkeypatch.setattr(torch.library, "Library", Operators)
    monkeypatch.setattr(torch, "ops", types.SimpleNamespace(torchvision=Operators()))
    monkeypatch.setattr(compat.shared, "_torchvision_library", None)
    return Operators.declared


def modules_of_torchvision():
    return [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]


@pytest.fixture
def torchvision(monkeypatch, tmp_path, operators):
    """Install a torchvision of some files, not imported; each file's name with its code."""
    own = {name: sys.modules.pop(name) for name in modules_of_torchvision()}
    monkeypatch.syspath_prepend(tmp_path)

    def install(code, **files):
        folder = tmp_path / "torchvision"
        folder.mkdir()
        (folder / "__init__.py").write_text(code)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)
        importlib.invalidate_caches()
        return folder

    yield install
    for name in modules_of_torchvision():
        del sys.modules[name]
    sys.modules.update(own)


# An extension that needs the operators not to exist yet, as a real one registers them.
REGISTERS = "import torch; torch.library.Library().define('nms()')"


@pytest.mark.parametrize("extension", ["_C__so", "_C_stable__so", "_C__pyd", "ops__so", ""])
def test_nothing_is_declared_for_a_torchvision_that_imports(
    torchvision, operators, extension
):
    torchvision(REGISTERS, **({extension: ""} if extension else {}))
    compat.prepare_torchvision()
    assert operators == {"nms": "nms()"}
    assert not compat.torchvision_is_patched()
    assert "torchvision" in sys.modules


# torchvision's own order: without its extension, the registration of nms fails, then qnms.
FAILS = """
import torch
from torchvision import extension, part
if part.imported:
    raise AssertionError("a part of the first attempt is left")
part.imported = True
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        raise RuntimeError(f"operator torchvision::{name} does not exist")
"""


@pytest.mark.parametrize("attempts", [0, 1, 2])
def test_operators_are_declared_after_a_failure_whoever_imports_first(
    torchvision, operators, attempts
):
    torchvision(FAILS, extension__py="", part__py="imported = False", _C_stable__so="")
    for _ in range(attempts):  # as `import timm` of a user's file
        sys.modules.pop("torchvision.part", None)
        with pytest.raises(RuntimeError, match="nms"):
            importlib.import_module("torchvision")
    compat.prepare_torchvision()
    assert set(operators) == {"nms", "qnms"}
    assert compat.torchvision_is_patched()
    module = sys.modules["torchvision"]
    compat.prepare_torchvision()
    assert sys.modules["torchvision"] is module


def test_operator_that_another_library_declares_is_left_to_it(torchvision, operators):
    operators["nms"] = "another's"
    torchvision(FAILS, extension__py="", part__py="imported = False")
    compat.prepare_torchvision()
    assert operators["nms"] == "another's"
    assert set(operators) == {"nms", "qnms"}


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (
            "raise RuntimeError('different CUDA\\nmajor versions')",
            "CUDA major",
        ),
        (MISSING.format("roi_align"), "torchvision::roi_align"),
        ("raise ImportError('libcudart.so.13: no such file')", "libcudart.so.13"),
        ("raise AttributeError('register_fake')", "AttributeError: register_fake"),
        ("raise OSError('undefined symbol')", "undefined symbol"),
    ],
)
def test_torchvision_that_cannot_be_imported_is_named_with_versions_and_remedy(
    torchvision, code, named
):
    torchvision(code)
    with pytest.raises(compat.MismatchError, match=named) as caught:
        compat.prepare_torchvision()
    message = str(caught.value)
    assert torch.__version__ in message
    assert "pip install --upgrade torch torchvision" in message
    assert "\n" not in message
    check = doctor.run_check("torchvision", doctor.check_torchvision, True)
    assert not check.works
    assert check.remedy.endswith("-m pip install --upgrade torch torchvision")


def test_absent_torchvision_is_left_to_the_host_to_name(monkeypatch, operators):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compat.prepare_torchvision()
    assert operators == {}


def test_imported_file_may_import_timm_before_any_host(torchvision, operators, tmp_path):
    torchvision(FAILS, extension__py="", part__py="imported = False")
    (tmp_path / "timm.py").write_text("import torchvision")
    file = tmp_path / "my_network_of_timm.py"
    file.write_text("import timm\nDONE = True\n")
    import_files([str(file)])
    assert sys.modules.pop("my_network_of_timm").DONE
    assert set(operators) == {"nms", "qnms"}


def test_doctor_ends_by_itself_whatever_torchvision_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "selcon_plugin", "doctor", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]  # and not -6, an abort

"""Imports of version 0.1 still work, and say where the module has moved."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from selcon_plugin._moved import MOVED


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for old in MOVED:
        monkeypatch.delitem(sys.modules, f"selcon_plugin.{old}", raising=False)


@pytest.mark.parametrize("old", MOVED)
def test_old_name_warns_and_gives_what_the_new_modules_hold(old: str) -> None:
    if "torchreid" in old and importlib.util.find_spec("torchreid") is None:
        pytest.skip("torchreid is not installed")
    with pytest.warns(DeprecationWarning, match=MOVED[old][0]):
        module = importlib.import_module(f"selcon_plugin.{old}")
    for new in MOVED[old]:
        found = importlib.import_module(f"selcon_plugin.{new}")
        public = [name for name in vars(found) if name[0].isupper()]
        assert getattr(module, public[-1]) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_documented_imports_of_version_0_1() -> None:
    from selcon_plugin.embedder import Embedder, FolderFeatures
    from selcon_plugin.label_free import label_free_quality
    from selcon_plugin.safe_loading import load_data

    from selcon_plugin import Embedder as SameEmbedder
    from selcon_plugin import FolderFeatures as SameFeatures

    assert (Embedder, FolderFeatures) == (SameEmbedder, SameFeatures)
    assert callable(label_free_quality)
    assert callable(load_data)


@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_modules_of_a_moved_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from selcon_plugin.cli.index import main

    for name in ("commands", "commands.index"):
        monkeypatch.delitem(sys.modules, f"selcon_plugin.{name}", raising=False)
    module = importlib.import_module("selcon_plugin.commands.index")
    assert module.main is main


@pytest.mark.parametrize("name", ["no_such_module", "commands.no_such_module"])
@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_unknown_module_is_still_unknown(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"selcon_plugin.{name}")

"""Tests of ``selcon doctor``: isolated checks, and the commands that fix failures."""

import importlib
import importlib.util
import json
import sys
import types

import pytest
import torch

from selcon_plugin import compat
from selcon_plugin.cli import doctor
from selcon_plugin.cli.doctor import Check, Report

needs_fastreid = pytest.mark.skipif(
    importlib.util.find_spec("fastreid") is None, reason="FastReID is not installed"
)


def raiser(error):
    def check():
        raise error

    return check


def report(*checks):
    return Report(versions={"python": "3.11.0", "timm": None}, checks=list(checks))


GOOD = Check("FastReID", works=True, needed=True, detail="imports")
GAP = Check("torchreid", works=False, needed=False, detail="not installed", remedy="pip x")
BROKEN = Check("faiss", works=False, needed=True, detail="no module", remedy="pip y")


def test_working_check_returns_its_detail():
    check = doctor.run_check("thing", lambda: "seen", True)
    assert check == Check("thing", works=True, needed=True, detail="seen")


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(1), OSError("gone")])
def test_any_exception_of_a_check_becomes_its_detail(error):
    check = doctor.run_check("thing", raiser(error), False)
    assert not check.works
    assert check.detail.startswith(type(error).__name__)


@pytest.mark.parametrize(
    ("module", "distribution"),
    [
        ("h5py", "h5py"),
        ("cv2", "opencv-python-headless"),
        ("sklearn.metrics", "scikit-learn"),
    ],
)
def test_remedy_for_a_missing_module_installs_its_distribution(module, distribution):
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    check = doctor.run_check("thing", raiser(error), True)
    assert check.remedy == f"{sys.executable} -m pip install {distribution}"


def test_remedy_for_a_missing_host_is_its_install_command():
    error = compat.HostMissingError("fastreid", compat.FASTREID_INSTALL)
    check = doctor.run_check("FastReID", raiser(error), True)
    assert check.detail == "not installed"
    assert check.remedy == f"{sys.executable} -m pip install --no-deps fastreid==1.4.0"


def test_one_broken_check_does_not_stop_the_others(monkeypatch):
    entries = (("a", raiser(RuntimeError("x")), False), ("b", lambda: "fine", True))
    monkeypatch.setattr(doctor, "_CHECKS", entries)
    assert [check.works for check in doctor.examine().checks] == [False, True]


@pytest.mark.parametrize(
    ("checks", "ready"), [([GOOD], True), ([GOOD, GAP], True), ([GOOD, GAP, BROKEN], False)]
)
def test_only_needed_checks_decide(monkeypatch, capsys, checks, ready):
    monkeypatch.setattr(doctor, "examine", lambda: report(*checks))
    assert doctor.main([]) == (0 if ready else 1)
    assert ("cannot run" in capsys.readouterr().out) is not ready


def test_table_shows_versions_gaps_and_remedies(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: report(GOOD, GAP, BROKEN))
    doctor.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["timm", "-"] in lines
    assert ["torchreid", "no", "not", "installed"] in lines
    assert ["faiss", "NO", "no", "module"] in lines
    assert ["pip", "x"] in lines
    assert ["pip", "y"] in lines


def test_json_contains_the_whole_report(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: report(GOOD, BROKEN))
    assert doctor.main(["--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["ready"] is False
    assert content["versions"] == {"python": "3.11.0", "timm": None}
    assert [check["name"] for check in content["checks"]] == ["FastReID", "faiss"]


def test_versions_include_this_python_and_torch():
    versions = doctor.installed_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert torch.__version__.startswith(versions["torch"].partition("+")[0])


def test_missing_dataset_root_is_checked_in_its_parent(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path / "not" / "yet"))
    assert "is writable" in doctor.check_dataset_root()
    assert not (tmp_path / "not").exists()


def test_dataset_root_that_is_a_file_is_a_gap(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FASTREID_DATASETS", str(file))
    check = doctor.run_check("data set root", doctor.check_dataset_root, True)
    assert not check.works
    assert check.remedy.startswith("export FASTREID_DATASETS=")


def test_faiss_that_finds_wrong_neighbors_is_a_gap(monkeypatch):
    class IndexFlatL2:
        def __init__(self, dimension): ...

        def add(self, vectors): ...

        def search(self, vectors, k):
            return None, torch.zeros(len(vectors), k, dtype=torch.int64).numpy()

    fake = types.SimpleNamespace(IndexFlatL2=IndexFlatL2)
    monkeypatch.setitem(sys.modules, "faiss", fake)
    check = doctor.run_check("faiss", doctor.check_faiss, True)
    assert check.detail == "a search returned wrong neighbors"


def test_remedy_for_torch_without_cuda_on_a_gpu_machine_reinstalls_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    check = doctor.run_check("GPU", doctor.check_gpu, False)
    assert "cannot use this machine's GPU" in check.detail
    assert "--force-reinstall" in check.remedy


def test_missing_gpu_has_no_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    check = doctor.run_check("GPU", doctor.check_gpu, False)
    assert not check.works
    assert not check.remedy


@pytest.mark.gpu
def test_gpu_multiplies():
    assert doctor.check_gpu().endswith("multiplies matrices correctly")


@needs_fastreid
def test_ranking_is_correct_and_wrong_scores_are_detected(monkeypatch):
    compat.prepare_fastreid()
    assert doctor.check_ranking() == "the Python evaluator ranks correctly"
    rank = importlib.import_module("fastreid.evaluation.rank")
    monkeypatch.setattr(rank, "evaluate_rank", lambda *a, **k: ([1, 1, 1], [1, 1], None))
    check = doctor.run_check("ranking", doctor.check_ranking, True)
    assert check.detail == "the evaluator returned wrong scores"


@needs_fastreid
@pytest.mark.parametrize(
    ("lacking", "detail", "remedy"),
    [
        ("Cython", "Cython is missing", "-m pip install Cython && cd "),
        ("compiler", "is missing", "apt install build-essential"),
        ("", "not compiled", "setup.py build_ext --inplace"),
    ],
)
def test_uncompiled_ranking_reports_the_missing_dependency(
    monkeypatch, lacking, detail, remedy
):
    compat.prepare_fastreid()
    monkeypatch.setitem(sys.modules, "fastreid.evaluation.rank_cylib.rank_cy", None)
    found = types.SimpleNamespace(origin=__file__)
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: None if name == lacking else found,
    )
    monkeypatch.setattr(
        doctor.shutil, "which", lambda name: None if lacking == "compiler" else name
    )
    monkeypatch.setattr(doctor.Path, "exists", lambda path: True)
    monkeypatch.setattr(doctor.compat, "prepare_fastreid", lambda: None)
    check = doctor.run_check("compiled ranking", doctor.check_compiled_ranking, False)
    assert detail in check.detail
    assert remedy in check.remedy


@needs_fastreid
def test_this_machine_can_train():
    assert doctor.examine().ready

"""``selcon doctor``: report what is installed, what works, and how to fix the rest.

Every check exercises the package or device itself (it imports, multiplies or searches)
instead of comparing version numbers, and a failing check does not stop the others.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selcon_plugin import compat
from selcon_plugin.cli.parsing import CommandParser
from selcon_plugin.installing import pip_install

__all__ = ["Check", "Report", "examine", "main", "run_check"]

# Packages to show, each with the names of the distributions that may provide it.
_PACKAGES = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "numpy": ("numpy",),
    "fastreid": ("fastreid",),
    "torchreid": ("torchreid",),
    "timm": ("timm",),
    "faiss": (
        "faiss-cpu",
        "faiss-gpu",
        "faiss-gpu-cu11",
        "faiss-gpu-cu12",
        "faiss-gpu-cu13",
    ),
    "numba": ("numba",),
    "scikit-learn": ("scikit-learn",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
}

# Modules whose distribution has a different name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}


class _Gap(Exception):  # noqa: N818  (a gap in the installation is not an error)
    """A failure that a check can explain, with the command that fixes it."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: Name of the checked component.
        works: Whether it works.
        needed: Whether training with FastReID requires it.
        detail: Observed behavior, or the error.
        remedy: Command that fixes the failure; empty if there is none.
    """

    name: str
    works: bool
    needed: bool
    detail: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The versions and check results of this machine.

    Attributes:
        versions: Installed version by package; None if it is not installed.
        checks: Results of the checks, in the order in which they ran.
    """

    versions: dict[str, str | None]
    checks: list[Check]

    @property
    def ready(self) -> bool:
        """Return whether training with FastReID, the main use, can run."""
        return all(check.works for check in self.checks if check.needed)


def examine() -> Report:
    """Look up the versions and run every check."""
    checks = [run_check(*entry) for entry in _CHECKS]
    return Report(versions=installed_versions(), checks=checks)


def installed_versions() -> dict[str, str | None]:
    """Look up the installed versions without importing the packages."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for label, names in _PACKAGES.items():
        versions[label] = next(filter(None, map(_version, names)), None)
    return versions


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_check(name: str, check: Callable[[], str], needed: bool) -> Check:
    """Run one check, and turn any exception into a result.

    Args:
        name: Name of the checked component.
        check: Returns the observed behavior, or raises.
        needed: Whether training requires the component.

    Returns:
        The result; a failure sets its detail and, if known, its remedy.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hosts emit many warnings at import
            detail = check()
    except _Gap as gap:
        return Check(name, False, needed, gap.detail, gap.remedy)
    except compat.HostMissingError as error:
        return Check(name, False, needed, "not installed", _this_pip(error.install_command))
    except compat.MismatchError as error:
        return Check(name, False, needed, error.detail, _this_pip(error.install_command))
    except ModuleNotFoundError as error:
        detail = getattr(error, "detail", str(error))
        return Check(name, False, needed, detail, _install_module(error.name))
    except (Exception, SystemExit) as error:  # a broken package can raise anything
        return Check(name, False, needed, f"{type(error).__name__}: {error}")
    return Check(name, True, needed, detail)


def _this_pip(command: str) -> str:
    """Return a ``pip install ...`` command for the running Python."""
    return f"{pip_install()}{command.removeprefix('pip install')}"


def _install_module(module: str | None) -> str:
    if module is None:
        return ""
    top = module.partition(".")[0]
    return _this_pip(f"pip install {_DISTRIBUTIONS.get(top, top)}")


# --- the checks --------------------------------------------------------------------------


def check_torchvision() -> str:
    """Import torchvision's transforms after applying the compatibility patches."""
    compat.prepare_torchvision()
    importlib.import_module("torchvision.transforms")
    if compat.torchvision_is_patched():
        return "imports; its compiled operators do not load here, but are not needed"
    return "imports"


def check_fastreid() -> str:
    """Import the modules that training with FastReID needs."""
    compat.prepare_fastreid()
    importlib.import_module("fastreid.engine")
    return "imports"


def check_torchreid() -> str:
    """Import torchreid in either of its two package layouts."""
    root = compat.import_torchreid()
    return f"imports as {root.__name__}"


def check_timm() -> str:
    """Import timm, the source of backbones newer than FastReID."""
    compat.prepare_torchvision()
    timm = importlib.import_module("timm")
    return f"imports; {len(timm.list_models()):,} backbones"


def check_faiss() -> str:
    """Search for each of some vectors with faiss; it must find itself."""
    faiss = importlib.import_module("faiss")
    vectors = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    index = faiss.IndexFlatL2(8)
    index.add(vectors)
    _, found = index.search(vectors, 1)
    if found[:, 0].tolist() != list(range(32)):
        raise _Gap(
            "a search returned wrong neighbors", _this_pip("pip install -U faiss-cpu")
        )
    return "a search on the CPU is correct"


def check_gpu() -> str:
    """Multiply two matrices on the GPU."""
    if torch.backends.mps.is_available():
        ones = torch.ones(64, 64, device="mps")
        if (ones @ ones).sum().item() != 64.0**3:
            raise _Gap("the Apple GPU returns wrong products")
        return "the Apple GPU multiplies correctly; it is used where mps is asked for"
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            raise _Gap("no NVIDIA GPU: training runs on the CPU")
        remedy = _this_pip("pip install --force-reinstall --no-deps torch torchvision")
        raise _Gap(f"torch {torch.__version__} cannot use this machine's GPU", remedy)
    ones = torch.ones(64, 64, device="cuda")
    if (ones @ ones).sum().item() != 64.0**3:
        raise _Gap(f"{torch.cuda.get_device_name()} returns wrong products")
    return f"{torch.cuda.get_device_name()} multiplies matrices correctly"


def check_faiss_gpu() -> str:
    """Search on the GPU with faiss."""
    if not torch.cuda.is_available():
        raise _Gap("no usable GPU: faiss searches on the CPU")
    faiss = importlib.import_module("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        command = "pip uninstall -y faiss-cpu && " + _this_pip("pip install faiss-gpu-cu12")
        raise _Gap("this faiss is built for the CPU", _this_pip(command))
    vectors = np.eye(8, dtype=np.float32)
    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), 8)
    index.add(vectors)
    _, found = index.search(vectors, 1)
    if found[:, 0].tolist() != list(range(8)):
        raise _Gap("a search returned wrong neighbors")
    return "a search on the GPU is correct"


def check_ranking() -> str:
    """Rank two queries with FastReID's Python evaluator."""
    _rank(use_cython=False)
    return "the Python evaluator ranks correctly"


def check_compiled_ranking() -> str:
    """Rank two queries with FastReID's compiled evaluator, if it is compiled."""
    compat.prepare_fastreid()
    try:
        importlib.import_module("fastreid.evaluation.rank_cylib.rank_cy")
    except ImportError:
        raise _compiled_ranking_gap() from None
    _rank(use_cython=True)
    return "the compiled evaluator ranks correctly"


def _rank(use_cython: bool) -> None:
    compat.prepare_fastreid()
    rank = importlib.import_module("fastreid.evaluation.rank")
    if use_cython and not rank.IS_CYTHON_AVAI:
        raise _Gap("it was compiled just now, and the next process will use it")
    distance = np.array([[0.1, 0.9, 0.5], [0.9, 0.6, 0.3]], np.float32)
    query = np.array([0, 1]), np.array([0, 0])
    gallery = np.array([0, 1, 2]), np.array([1, 1, 1])
    cmc, average_precision, _ = rank.evaluate_rank(
        distance, query[0], gallery[0], query[1], gallery[1], 3, use_cython=use_cython
    )
    # Query 0 finds its match first, query 1 second.
    if not (np.allclose(cmc, [0.5, 1, 1]) and np.allclose(average_precision, [1, 0.5])):
        raise _Gap("the evaluator returned wrong scores")


def _compiled_ranking_gap() -> _Gap:
    spec = importlib.util.find_spec("fastreid.evaluation.rank_cylib")
    folder = Path(str(spec.origin)).parent if spec else Path()
    build = f"cd {folder} && {sys.executable} setup.py build_ext --inplace"
    missing = [m for m in ("Cython", "setuptools") if importlib.util.find_spec(m) is None]
    if missing:
        install = _this_pip("pip install " + " ".join(missing))
        return _Gap(f"not compiled: {missing[0]} is missing", f"{install} && {build}")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return _Gap(f"not compiled: {compiler} is missing", "apt install build-essential")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        return _Gap(f"not compiled: {headers} is missing", "apt install python3-dev")
    if not os.access(folder, os.W_OK):
        return _Gap(f"not compiled: {folder} is not writable", f"sudo sh -c '{build}'")
    return _Gap("not compiled yet: the first evaluation compiles it", build)


def check_dataset_root() -> str:
    """Write to the data set root, or to the parent folder in which it would be created."""
    root = Path(os.environ.get("FASTREID_DATASETS", "datasets")).absolute()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        remedy = "export FASTREID_DATASETS=$HOME/datasets"
        raise _Gap(f"{existing} is not writable: {error.strerror}", remedy) from error
    return f"{root} is writable"


_CHECKS: tuple[tuple[str, Callable[[], str], bool], ...] = (
    ("torchvision", check_torchvision, True),
    ("FastReID", check_fastreid, True),
    ("faiss", check_faiss, True),
    ("data set root", check_dataset_root, True),
    ("ranking", check_ranking, True),
    ("compiled ranking", check_compiled_ranking, False),
    ("GPU", check_gpu, False),
    ("faiss on GPU", check_faiss_gpu, False),
    ("timm", check_timm, False),
    ("torchreid", check_torchreid, False),
)


# --- the output --------------------------------------------------------------------------


def format_report(report: Report) -> str:
    """Format a report for a terminal."""
    lines = ["Installed"]
    for package, version in report.versions.items():
        lines.append(f"  {package:18}{version or '-'}")
    lines += ["", "Works"]
    for check in report.checks:
        mark = "yes" if check.works else "NO" if check.needed else "no"
        lines.append(f"  {check.name:18}{mark:5}{check.detail}")
    gaps = [check for check in report.checks if not check.works and check.remedy]
    if gaps:
        lines += ["", "Fixes"]
        for check in gaps:
            lines += [f"  {check.name}:", f"    {check.remedy}"]
    lines += ["", _verdict(report)]
    return "\n".join(lines) + "\n"


def _verdict(report: Report) -> str:
    if report.ready:
        return "Training with FastReID can run here."
    broken = ", ".join(c.name for c in report.checks if c.needed and not c.works)
    return f"Training with FastReID cannot run here yet: {broken}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``selcon doctor``.

    Args:
        argv: Arguments after ``selcon doctor``; None for those of the process.

    Returns:
        Exit status: 0 if training with FastReID can run here, else 1.
    """
    arguments = _parser().parse_args(argv)
    report = examine()
    if arguments.json:
        content: dict[str, Any] = {**dataclasses.asdict(report), "ready": report.ready}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        sys.stdout.write(format_report(report))
    return 0 if report.ready else 1


if __name__ == "__main__":
    sys.exit(main())


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="selcon doctor",
        description="Report what is installed, what works, and how to fix the rest.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser

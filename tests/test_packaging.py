"""Requirements of the hosts and of the targets of make; source distribution and wheel."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers.hosts import ROOT

REQUIREMENTS = ROOT / "requirements"
# Names of modules whose distribution is called otherwise.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# What the hosts import only if it is there, each for a reason.
OPTIONAL = {
    "fastreid": {
        "detectron2",  # its environment report, in a try
        "fvcore",  # the same
        "rfconv",  # ResNeSt with rectified_conv, which no config sets
    },
    "torchreid": set(),
}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(file):
    lines = (REQUIREMENTS / file).read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines if line}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the files of the repository: a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    everywhere = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.nb[ic]", ".DS_Store")
    # As .gitignore names them: a test of the unpacked sdist has no git to ask.
    at_the_top = shutil.ignore_patterns(
        *(
            ".git",
            ".venv",
            "*.egg-info",
            "build",
            "dist",
            "site",
            ".*_cache",
            ".hypothesis",
        ),
        *("log", "logs", "datasets", "outputs", "demo_output", "PKG-INFO", "setup.cfg"),
    )

    def ignore(folder, names):
        generated = {"modules"} if Path(folder) == ROOT / "docs" / "api" else set()
        if Path(folder) == ROOT:
            generated |= at_the_top(folder, names)
        return generated | everywhere(folder, names)

    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


def build(folder, what, output):
    code = f"from setuptools import build_meta; print(build_meta.{what}({str(output)!r}))"
    output.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tree):
    file = build(tree, "build_sdist", tree.parent / "sdist")
    with tarfile.open(file) as archive:
        archive.extractall(tree.parent / "unpacked", filter="data")
    return next((tree.parent / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(sdist):
    copy = shutil.copytree(sdist, sdist.parents[1] / "of_the_wheel")
    return build(copy, "build_wheel", copy.parent / "wheel")


@pytest.fixture(scope="module")
def extras(wheel):
    """Requirements by extra, ``""`` for the package itself, from the wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = {line.split(": ")[1]: set() for line in lines if line.startswith("Provides-E")}
    found[""] = set()
    for line in lines:
        if line.startswith("Requires-Dist: "):
            extra = re.search(r"extra == ['\"]([\w-]+)", line)
            name = re.match(r"[\w.-]+", line.removeprefix("Requires-Dist: "))[0]
            found[extra[1] if extra else ""].add(normal(name))
    return found


def imports_of(host):
    package = Path(importlib.util.find_spec(host).origin).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name, file) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module, file


@pytest.mark.parametrize("host", ["fastreid", "torchreid"])
def test_every_module_that_a_host_imports_is_required(extras, host):
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed")
    required = extras[""] | extras[f"{host}-deps"]
    known = {host, *sys.stdlib_module_names, *OPTIONAL[host]}
    missing = {
        f"{top} ({file.name})"
        for name, file in imports_of(host)
        if (top := name.partition(".")[0]) not in known
        and normal(DISTRIBUTIONS.get(top, top)) not in required
    }
    assert missing == set()


def test_targets_install_what_the_extras_require(extras):
    no_deps = {"demo": "demo-no-deps.txt", "test": "test-no-deps.txt"}
    installed = names_in("demo.txt") | names_in(no_deps["demo"])
    linux = extras[""] - {"psutil"}  # which Windows needs
    assert linux | extras["demo"] | extras["fastreid-deps"] <= installed
    installed |= names_in("test.txt") | names_in(no_deps["test"])
    assert extras["test"] | extras["torchreid-deps"] | extras["export"] <= installed
    assert extras["docs"] <= installed | names_in("docs.txt")
    installed |= names_in("dev.txt") | names_in("docs.txt")
    assert extras["dev"] <= installed


def test_demo_installs_no_test_tools_and_nothing_under_gpl(extras):
    for extra in ("", "demo", "fastreid-deps", "torchreid-deps", "export", "search"):
        assert not extras[extra] & {"infomap", "playwright", "mypy", "pytest", "ruff"}
    installed = names_in("demo.txt") | names_in("demo-no-deps.txt")
    assert not installed & {"infomap", "playwright", "mypy", "pytest", "ruff", "hypothesis"}
    assert "infomap" not in names_in("dev.txt")


def test_every_version_is_fixed():
    fixed = names_in("constraints.txt")
    for file in ("demo.txt", "test.txt", "dev.txt", "docs.txt"):
        assert names_in(file) <= fixed, file
    for file in ("demo-no-deps.txt", "test-no-deps.txt"):
        text = (REQUIREMENTS / file).read_text()
        lines = [line for line in text.splitlines() if line and line[0] != "#"]
        assert all("==" in line for line in lines), file


def test_every_extra_that_a_text_names_exists(extras):
    code = re.compile(r"install_(?:command|needs)\(['\"]([\w-]+)['\"]\)")
    pages = re.compile(r"(?:\.|selcon_plugin)\[([a-z][\w,-]*)\]")
    used = set()
    for path in (ROOT / "selcon_plugin").rglob("*.py"):
        used |= set(code.findall(path.read_text(encoding="utf-8")))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for listed in pages.findall(path.read_text(encoding="utf-8")):
            used |= set(listed.split(","))
    assert {"export", "search", "demo", "torchreid-deps"} <= used
    assert used <= extras.keys()


def test_supported_versions_are_those_of_the_matrix(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/METADATA"))
        text = archive.read(name).decode()
    matrix = (ROOT / "tools" / "matrix.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "quick_start.md").read_text(encoding="utf-8")
    python = re.search(r"Requires-Python: >=(\d+)\.(\d+)", text)
    assert f"OLDEST_PYTHON = ({python[1]}, {python[2]})" in matrix
    assert f"Python ≥ {python[1]}.{python[2]}," in page
    for package in ("torch", "torchvision"):
        oldest = re.search(rf"Requires-Dist: {package}>=(\S+)", text)[1]
        assert f'"{package}=={oldest}.0"' in matrix
    assert f"torch (≥ {re.search(r'torch>=([0-9.]+)', text)[1]})" in page


def test_source_distribution_holds_every_file_of_the_repository(tree, sdist):
    def files(folder):
        return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}

    generated = {"selcon_plugin.egg-info", "PKG-INFO", "setup.cfg"}
    shipped = {name for name in files(sdist) if name.split("/")[0] not in generated}
    ours = {name for name in files(tree) if name.split("/")[0] not in generated}
    assert shipped == ours
    for name in ("conftest.py", "Makefile", "requirements/demo.txt", "docs/conf.py"):
        assert name in shipped


def test_wheel_holds_configs_templates_and_types_and_finds_them(tree, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"selcon_plugin", next(t for t in tops if t.endswith(".dist-info"))}
    for folder in ("configs", "selcon_plugin"):
        inside = "" if folder == "selcon_plugin" else "selcon_plugin/"
        for file in (tree / folder).rglob("*"):
            if file.is_file():
                assert inside + file.relative_to(tree).as_posix() in names
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from selcon_plugin.config import files\n"
        "from selcon_plugin.report import page\n"
        "print(files.builtin_config('image_folder.yml'), page.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(str(tmp_path)) == 2

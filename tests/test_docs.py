"""The documentation site: its pages, its links, and that it fetches nothing."""

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from selcon_plugin.hosts import get_host

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "modules" not in page.parts]


def toctree_entries(page):
    """The pages that a page lists in its tables of contents."""
    for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.strip() and not line.startswith(":"):
                yield (page.parent / line.strip()).relative_to(DOCS).as_posix()


def test_every_page_is_in_a_table_of_contents_once():
    listed = [entry for page in PAGES for entry in toctree_entries(page)]
    assert len(listed) == len(set(listed))
    there = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert set(listed) - {"api/modules/selcon_plugin"} == there - {"index"}
    assert not there & {"search", "genindex", "py-modindex"}  # pages of Sphinx itself


def test_pages_link_to_pages_of_the_site_only():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            target = Path(os.path.normpath(page.parent / link))
            assert DOCS in target.parents, (page, link)
            assert target.exists(), (page, link)


@pytest.mark.parametrize("name", ["design", "layers"])
def test_drawing_is_whole_and_has_a_title(name):
    root = ElementTree.parse(DOCS / "assets" / f"{name}.svg").getroot()
    assert root.get("role") == "img"
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title.get("id") == root.get("aria-labelledby")


def test_pictures_are_small_used_and_described():
    pictures = [file for file in (DOCS / "images").iterdir() if file.is_file()]
    assert sum(picture.stat().st_size for picture in pictures) < 1_000_000
    pages = [ROOT / "README.md", *PAGES]
    texts = "\n".join(page.read_text() for page in pages)
    for picture in pictures:
        assert picture.stat().st_size < 150_000
        described = re.findall(rf"!\[([^\]]*)\]\([^)]*images/{picture.name}\)", texts)
        assert described
        assert all(len(text) > 20 for text in described)


def test_layers_of_the_drawing_and_of_the_map_are_those_of_the_package():
    drawing = (DOCS / "assets/layers.svg").read_text()
    contents = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "selcon_plugin"
    folders = {file.parent.name for file in package.glob("*/__init__.py")}
    for name in folders:
        assert re.search(rf"\b{name}\b", drawing), name
        assert re.search(rf"^{name}/ +\S", contents, re.MULTILINE), name
    mapped = re.findall(r"^(\w+)/ ", contents, re.MULTILINE)
    assert set(mapped) == folders


def test_keys_named_in_the_pages_exist():
    if importlib.util.find_spec("fastreid") is None:
        pytest.skip("FastReID is not installed")
    flat = get_host("fastreid").help().defaults
    known = {*flat, *(".".join(key.split(".")[:n]) for key in flat for n in (1, 2, 3))}
    pattern = r"\b(?:MODEL|SOLVER|TEST|DATALOADER|INPUT)(?:\.[A-Z0-9_]+)+"
    for name in ("fastreid", "compare", "troubleshooting", "watch_a_run"):
        named = set(re.findall(pattern, (DOCS / f"{name}.md").read_text()))
        assert named
        assert named <= known, named - known


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning of Sphinx is an error, as in ``make docs``."""
    for module in ("sphinx", "furo", "myst_parser", "sphinx_design", "sphinx_copybutton"):
        pytest.importorskip(module)
    for host in ("fastreid", "torchreid"):  # the reference documents both adapters
        if importlib.util.find_spec(host) is None:
            pytest.skip(f"{host} is not installed")
    folder = tmp_path_factory.mktemp("docs")
    site = folder / "site"
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(DOCS), str(site)],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return site


def test_site_is_built_strictly_and_fetches_nothing(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    fetched = r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(https?:[^\">]*)"
    for page in pages:
        assert not re.findall(fetched, page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?https?:|@import", style.read_text()), style


def test_search_works_from_a_folder_and_reference_is_complete(site):
    # The index is a script: a browser reads no other file from file://.
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")
    reference = (site / "api/modules/selcon_plugin.losses.html").read_text()
    assert "selective_contrastive_loss" in reference
    face = (site / "api/index.html").read_text()
    assert (
        'href="modules/selcon_plugin.workflows.html#selcon_plugin.workflows.fit.fit"'
        in face
    )

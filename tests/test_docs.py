"""The documentation site: its pages, its links, and that it fetches nothing."""

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from selcon_plugin.hosts import get_host

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONFIG = ROOT / "mkdocs.yml"


def nav_pages(nav):
    for entry in nav:
        values = [entry] if isinstance(entry, str) else entry.values()
        for value in values:
            yield from nav_pages(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_nav_once():
    listed = list(nav_pages(yaml.safe_load(CONFIG.read_text())["nav"]))
    assert len(listed) == len(set(listed))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(listed) == there


def test_pages_link_to_pages_of_the_site_alone():
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            # Not resolved: two pages are links to files that stand elsewhere.
            target = Path(os.path.normpath(page.parent / link))
            assert DOCS in target.parents, (page, link)
            assert target.exists(), (page, link)


def test_picture_is_whole_and_has_a_title():
    root = ElementTree.parse(DOCS / "assets" / "design.svg").getroot()
    assert root.get("role") == "img"
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title.get("id") == root.get("aria-labelledby")


def test_keys_named_in_the_pages_exist():
    if importlib.util.find_spec("fastreid") is None:
        pytest.skip("FastReID is not installed")
    flat = get_host("fastreid").help().defaults
    known = {*flat, *(".".join(key.split(".")[:n]) for key in flat for n in (1, 2, 3))}
    pattern = r"\b(?:MODEL|SOLVER|TEST|DATALOADER|INPUT)(?:\.[A-Z0-9_]+)+"
    for name in ("quick_start", "troubleshooting", "watch_a_run"):
        named = set(re.findall(pattern, (DOCS / f"{name}.md").read_text()))
        assert named
        assert named <= known, named - known


def test_site_is_built_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("material")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(site)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    fetched = r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(https?:[^\">]*)"
    for page in pages:
        assert not re.findall(fetched, page.read_text()), page

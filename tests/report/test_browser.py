"""The pages in headless Chromium: coloring, keyboard, no requests, width of a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from selcon_plugin.report import write_comparison, write_report
from selcon_plugin.retrieval.page import write_page
from selcon_plugin.retrieval.results import Match, QueryResult

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file; fail on any console message, error or request."""
    seen = []

    def open_file(file, **options):
        page = browser.new_page(**options)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(file.as_uri())
        assert seen.pop(0) == file.as_uri()
        return page

    yield open_file
    assert [text for text in seen if not text.startswith("data:")] == []


def test_colors_keys_and_legend(make_run, open_page):
    page = open_page(write_report(make_run()), viewport={"width": 1280, "height": 900})
    assert page.is_visible("#view-cluster")
    assert page.is_hidden("#view-camera")
    page.click("label[for=by-camera]")
    assert page.is_hidden("#view-cluster")
    assert page.is_visible("#view-camera")
    page.keyboard.press("ArrowLeft")  # the radio button has the focus
    assert page.is_visible("#view-cluster")

    page.focus("#map-box")
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#map-text")
    assert "cluster" in first
    assert "camera" in first
    assert page.is_visible("#map-tip .crop")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#map-text") != first
    assert page.text_content("#map-now").split(", ") == page.inner_text("#map-text").split(
        "\n"
    )
    page.keyboard.press("Escape")
    assert page.is_hidden("#map-tip")

    button = page.locator("#view-cluster button").first
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator("#view-cluster .mark.chosen").count() == 1
    button.click()
    assert page.locator(".mark.chosen").count() == 0


@pytest.mark.parametrize("height", [400, 720, 900])
def test_pointer_shows_the_image_below_it(make_run, open_page, height):
    page = open_page(write_report(make_run()), viewport={"width": 1280, "height": height})
    points = page.evaluate(
        "JSON.parse(document.getElementById('map-data').textContent).points"
    )
    x, y, name = points[0][:3]
    # The map is 798 pixels high, and the pointer reaches only what the window shows. The
    # browser's own window may be lower than the one that is asked for.
    at = page.evaluate(
        """([x, y]) => {
            const map = document.querySelector('#view-cluster svg');
            const place = () => new DOMPoint(x, y).matrixTransform(map.getScreenCTM());
            const middle = window.visualViewport.height / 2;
            window.scrollBy({top: place().y - middle, behavior: 'instant'});
            return [place().x, place().y];
        }""",
        [x, y],
    )
    assert 0 <= at[1] < min(height, page.evaluate("window.innerHeight"))
    page.mouse.move(*at)
    assert page.inner_text("#map-text").split("\n")[0] == name == "<b>&'\"x.png"


def test_tab_reaches_everything_in_order(make_run, open_page):
    page = open_page(write_report(make_run()))
    order = []
    for _ in range(100):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("(e => e.id || e.className || e.tagName)(document.activeElement)")
        )
        if order[-1] == "BODY":
            break
    assert order[0] == "skip"
    assert order[1:9] == ["A"] * 8
    assert order.index("by-cluster") < order.index("map-box") < order.index("BUTTON")
    assert "SUMMARY" in order
    assert "scroll" in order


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_nothing_is_wider_than_the_window(make_run, open_page, tmp_path, width, scheme):
    view = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    page = open_page(write_report(make_run()), **view)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = (
        page.evaluate("getComputedStyle(document.body).backgroundColor")
        != "rgb(255, 255, 255)"
    )
    assert dark == (scheme == "dark")
    assert len(page.screenshot(full_page=True)) > 20_000
    pages = [make_run("a"), make_run("b")]
    page = open_page(write_comparison(pages, tmp_path / "comparison.html"), **view)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    files = sorted((tmp_path / "a").glob("*.png"))
    matches = tuple(Match(str(file), 0.9, "door") for file in files[1:9])
    found = tmp_path / "search.html"
    write_page(found, [QueryResult(str(files[0]), matches)], summary="48 images")
    page = open_page(found, **view)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".results img").count() == 8


def test_both_maps_are_printed(make_run, open_page):
    page = open_page(write_report(make_run()))
    page.emulate_media(media="print")
    assert page.is_visible("#view-cluster")
    assert page.is_visible("#view-camera")
    assert page.is_hidden("nav")
    assert len(page.pdf()) > 10_000

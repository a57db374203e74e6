"""The documentation site: it builds without a warning, needs no server and no network, and fits a phone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from browsers import chromium, needs_browser, problems, wait

ROOT = Path(__file__).parent.parent
PHONE, LAPTOP = (390, 844), (1280, 900)
SEARCHES = (
    "logit lens",
    "steer",
    "train from python",
    "attention pattern",
    "run_with_cache",
    "ablate",
    "SAETrainingRunner",
    "circuitsvis",
    "contributing",
)
"""What users of other libraries look for."""


class Links(HTMLParser):
    """The addresses that a page names, those that it loads by itself, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        address = found.get("href") or found.get("src")
        if address is not None:
            self.links.append(address)
            if tag not in ("a", "area") and found.get("rel") not in ("next", "prev", "canonical"):
                self.loaded.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def test_every_link_and_anchor_of_the_built_pages_exists(pages):
    missing = []
    for page, links in pages.items():
        for link in links.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            in_page = pages[target].anchors if target in pages else None
            if not target.exists() or (in_page is not None and parts.fragment and parts.fragment not in in_page):
                missing.append(f"{page.name}: {link}")
    assert not missing


def test_no_page_loads_anything_from_another_place(pages):
    loaded = {link for links in pages.values() for link in links.loaded}
    assert not [link for link in loaded if urlsplit(link).scheme not in ("", "data") or urlsplit(link).netloc]


@needs_browser
@pytest.mark.parametrize(("width", "height"), [PHONE, LAPTOP])
def test_no_page_scrolls_sideways(site, pages, browser, width, height):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE[0]},
    )
    wide = []
    for page in pages:
        browser.get(page.as_uri())
        if browser.execute_script("return document.documentElement.scrollWidth > innerWidth"):
            wide.append(str(page.relative_to(site)))
    assert not wide
    assert not problems(browser)


@needs_browser
@pytest.mark.parametrize("words", SEARCHES)
def test_the_search_works_from_a_file_and_finds_what_users_look_for(site, browser, words):
    browser.get("about:blank")
    browser.get(f"{(site / 'index.html').as_uri()}?q={words.replace(' ', '+')}")
    wait(browser, "document.querySelector('.md-search-result__item')")
    assert not problems(browser)

"""A real browser for tests of pages: headless Chromium, and the errors on its console."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs chromium and chromedriver (Debian: apt install chromium chromium-driver)",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a driver of a window of 1000 x 900."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def open_and_wait(browser: Any, page: Path, address: str, busy: str) -> None:
    """Load a page anew, and wait until an element is no longer `aria-busy`."""
    browser.get("about:blank")
    browser.get(f"{page.as_uri()}{address}")
    wait(browser, f"!document.querySelector('{busy}').hasAttribute('aria-busy')")


def wait(browser: Any, condition: str) -> None:
    """Wait until a JavaScript expression is true, 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not browser.execute_script(f"return Boolean({condition})"):
        assert time.monotonic() < deadline, f"never: {condition}"
        time.sleep(0.02)


def texts(browser: Any, selector: str) -> list[str]:
    """Return the text of every element that a CSS selector finds."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def problems(driver: Any) -> list[dict[str, Any]]:
    """Return the errors and warnings on the console since the last call."""
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

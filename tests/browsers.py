"""A real browser for tests of pages: headless Chromium, and the errors on its console."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


def problems(driver: Any) -> list[dict[str, Any]]:
    """Return the errors and warnings on the console since the last call."""
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

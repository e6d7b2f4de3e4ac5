"""One headless browser for all tests of the report's page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_DRIVERS = ("chromedriver",)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips without one, unless FINFLUENCE_REQUIRE_BROWSER=1 asks for it."""
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = next(filter(None, map(shutil.which, _DRIVERS)), None)
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        webdriver = Service = None
    if program is None or driver is None or webdriver is None or Service is None:
        found = f"chromium {program}, chromedriver {driver}, selenium {'found' if webdriver else None}"
        if os.environ.get("FINFLUENCE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"a browser is required but not complete: {found}")
        pytest.skip(f"no headless browser: {found}")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # the driver's path is given, so that nothing is looked up on the network
    session = webdriver.Chrome(options=options, service=Service(driver))
    session.set_script_timeout(60)
    yield session
    session.quit()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page from its file in a window of a size and theme, and waits until it is ready."""
    from selenium.webdriver.support.ui import WebDriverWait

    def open_page(path: Path, *, width: int = 1300, height: int = 1000, theme: str = "light") -> Any:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {
                "features": [
                    {"name": "prefers-color-scheme", "value": theme},
                    {"name": "prefers-reduced-motion", "value": "reduce"},
                ]
            },
        )
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # what earlier pages logged
        browser.get(path.resolve().as_uri())
        WebDriverWait(browser, 60).until(
            lambda driver: driver.execute_script(
                "return document.documentElement.dataset.ready || !document.getElementById('failure').hidden"
            )
        )
        return browser

    yield open_page
    browser.execute_script("try { localStorage.clear(); } catch (error) { /* no storage for files */ }")

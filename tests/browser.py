"""A real headless browser, for pages that are files."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver of Chromium with a new profile; skips where there is none, except in CI, which installs it."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = f"needs Chromium and chromedriver; found {binary} and {driver}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        # the page of a new tab asks for a lot
        browser.get("about:blank")
        yield browser
    finally:
        browser.quit()


def open_page(browser: Any, page: Path, width: int, scheme: str) -> None:
    """Open a file in a window of a width in CSS pixels, with a preference for ``light`` or ``dark``."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    browser.get_log("performance")
    browser.get(page.resolve().as_uri())
    # pictures are decoded after the page has loaded
    browser.execute_async_script(
        "const done = arguments[0]; Promise.allSettled([...document.images].map(i => i.decode())).then(() => done())"
    )


def requests(browser: Any) -> list[str]:
    """Addresses of everything that was asked for since the page was opened."""
    messages: list[Mapping[str, Any]] = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def screenshot(browser: Any, path: Path) -> None:
    """The whole page, also what is below the window."""
    options = {"captureBeyondViewport": True, "fromSurface": True}
    path.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))

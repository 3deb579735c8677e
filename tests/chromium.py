"""Headless Chromium for tests of pages: one session, what it logged, and what it asked the network for."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def missing() -> str:
    """Why there is no browser here; "" if there is one."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(lacking)}" if lacking else ""


class Browser:
    """A session, by the DevTools protocol."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def look(self, width: int = 1180, *, dark: bool = False, media: str = "", height: int = 900) -> None:
        """How the next pages are seen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})

    def open(self, path: Path) -> None:
        """Load a page and wait until its charts are drawn; forgets what was logged before."""
        self.logged(), self.requests()
        self.driver.get(path.as_uri())
        self.driver.execute_async_script("const done = arguments[0]; ksm.drawn.then(() => done(), done)")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def logged(self) -> list[str]:
        """Warnings and errors on the console since the last call."""
        return [each["message"] for each in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call, over the network or not."""
        events = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, width: int, height: int, start: str = "") -> bytes:
        """The top of the page, or from the element of this id on, as PNG."""
        top = "const e = document.getElementById(arguments[0]); return e ? e.getBoundingClientRect().top + scrollY : 0"
        clip = {"x": 0, "y": self.run(top, start), "width": width, "height": height, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        return base64.b64decode(shot["data"])

    def printed(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A session with a fresh profile, ended with the block."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(30)
        yield Browser(driver)
    finally:
        driver.quit()

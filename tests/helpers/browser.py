"""A real browser without a screen: Debian's Chromium, driven by selenium, with no connection to anywhere."""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)


def missing() -> str | None:
    """Why no browser can be started, or None."""
    found = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(found)} not on PATH (Debian: apt-get install chromium chromium-driver)" if found else None


@contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver whose profile is new and goes with it; it records what the page asks the network for."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
        try:
            driver.get("about:blank")
            driver.get_log("performance")  # what the browser's own first page asked for
            yield driver
        finally:
            driver.quit()


def show(driver: Any, page: Path, *, scheme: str = "light", width: int = 1280, height: int = 900) -> None:
    """Open a page from the disk in a window of this size, for people who like it light or dark."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for log in ("browser", "performance"):
        driver.get_log(log)  # what was said of the page before this one
    driver.get(page.resolve().as_uri())


def requests(driver: Any) -> list[str]:
    """URLs that pages have asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def blocked(driver: Any) -> list[str]:
    """Why requests since the last call were not made."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"].get("blockedReason", "") for m in messages if m["method"] == "Network.loadingFailed"]


def photograph(driver: Any, *, height: int | None = None) -> bytes:
    """The page as a PNG: all of it, or from its top down to ``height``."""
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(shot["data"])

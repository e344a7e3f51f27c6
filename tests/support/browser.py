"""A real headless Chromium, driven through chromedriver by the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    _CHROMIUM is None or _DRIVER is None, reason="no chromium and chromedriver on this machine"
)


_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
)


class Browser:
    """One tab."""

    def __init__(self, address: str) -> None:
        self._session = address + "/session"
        options = {
            "binary": _CHROMIUM,
            "args": [*_ARGUMENTS],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        started = self._ask("", {"capabilities": {"alwaysMatch": wanted}})
        self._session += f"/{started['sessionId']}"

    def open(self, page: Path) -> None:
        """Show a file."""
        self._ask("/url", {"url": page.absolute().as_uri()})

    def run(self, script: str) -> Any:
        """What JavaScript returns."""
        return self._ask("/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        """Keys of a keyboard, one after the other, to whatever has the focus."""
        codes = {"Tab": "\ue004", "Enter": "\ue007", "Space": " "}
        actions = [
            {"type": kind, "value": codes[key]} for key in keys for kind in ("keyDown", "keyUp")
        ]
        self._ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def console(self) -> list[str]:
        """What was logged since this was last asked."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]

    def look(self, *, width: int, dark: bool, height: int = 900) -> None:
        """Be a screen of this width, in this theme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", size)

    def shoot(self, path: Path) -> None:
        """A picture of the whole page."""
        wanted = {"format": "png", "captureBeyondViewport": True}
        size = self.cdp("Page.getLayoutMetrics", {})["cssContentSize"]
        wanted["clip"] = {"x": 0, "y": 0, "scale": 1} | {k: size[k] for k in ("width", "height")}
        path.write_bytes(base64.b64decode(self.cdp("Page.captureScreenshot", wanted)["data"]))

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        """A command of the DevTools protocol."""
        return self._ask("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def close(self) -> None:
        """Quit."""
        self._ask("", None, method="DELETE")

    def _ask(self, path: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 (this machine)
            self._session + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 (as above)
            return json.load(answer)["value"]


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser that is closed in the end."""
    assert _DRIVER is not None
    driver = subprocess.Popen([_DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(x[1] for line in driver.stdout if (x := re.search(r"on port (\d+)\.", line)))
        browser = Browser(f"http://127.0.0.1:{port}")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.communicate()

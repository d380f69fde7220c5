"""A headless Chromium for tests of pages, driven through chromedriver's own HTTP interface.

Debian has both in the packages `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--no-first-run", "--disable-sync", "--hide-scrollbars"),
)
_open = build_opener(ProxyHandler({})).open


_CONTRASTS = """
const channel = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const share = [0.2126, 0.7152, 0.0722];
const light = (rgba) => share.reduce((sum, part, n) => sum + part * channel(rgba[n] / 255), 0);
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const pixel = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const behind = (element) => {
  const found = pixel(getComputedStyle(element).backgroundColor);
  return found[3] === 255 || !element.parentElement ? found : behind(element.parentElement);
};
const words = (element) => [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
const seen = [...document.querySelectorAll("body *")].filter((e) => words(e) && e.offsetHeight);
return seen.map((e) => {
  const [a, b] = [pixel(getComputedStyle(e).color), behind(e)].map(light).sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.textContent.trim()];
});
"""


class Browser:
    """One page at a time."""

    def __init__(self, session: str) -> None:
        self.session = session

    def script(self, text: str) -> Any:
        """Return what the body of a function gives in the page."""
        return _post(f"{self.session}/execute/sync", {"script": text, "args": []})

    def tool(self, command: str, **options: Any) -> Any:
        """Return what a command of the developer tools gives."""
        asked = {"cmd": command, "params": options}
        return _post(f"{self.session}/goog/cdp/execute", asked)

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Show a file in a window of some CSS pixels."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.tool("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tool("Emulation.setEmulatedMedia", features=[scheme])
        _post(f"{self.session}/url", {"url": page.resolve().as_uri()})

    def contrasts(self) -> list[tuple[float, str]]:
        """Return the contrast of every visible text with what is behind it, as WCAG counts it."""
        return [(ratio, text) for ratio, text in self.script(_CONTRASTS)]

    def messages(self) -> list[str]:
        """Return what the console said since the last call."""
        return [one["message"] for one in _post(f"{self.session}/se/log", {"type": "browser"})]

    def picture(self) -> bytes:
        """Return the whole page as PNG."""
        shot = self.tool("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


@contextmanager
def browser() -> Iterator[Browser]:
    """Yield a browser; the test is skipped where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        # Reason to skip: pip installs no browser; other tests hold what the pages contain.
        pytest.skip("no browser: install Debian's packages chromium and chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen([driver, f"--port={port}"], **quiet) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}/session"
            options = {
                "binary": chromium,
                "args": [*_ARGUMENTS, f"--user-data-dir={profile}"],
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = _started(address, {"capabilities": {"alwaysMatch": wanted}})
            yield Browser(f"{address}/{session['sessionId']}")
            _send(Request(f"{address}/{session['sessionId']}", method="DELETE"))
        finally:
            process.terminate()


def _started(address: str, wanted: dict[str, Any]) -> Any:
    for _ in range(100):
        try:
            return _post(address, wanted)
        except URLError as error:  # not listening yet
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)
    raise TimeoutError("chromedriver does not answer")


def _post(address: str, data: dict[str, Any]) -> Any:
    return _send(Request(address, json.dumps(data).encode(), method="POST"))


def _send(request: Request) -> Any:
    with _open(request, timeout=60) as answer:
        return json.load(answer)["value"]

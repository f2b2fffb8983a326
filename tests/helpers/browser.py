"""Headless Chromium through its DevTools protocol: what a page shows, logs and looks like."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from websockets.sync.client import ClientConnection, connect

_PATIENCE_S = 30.0


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        # Console messages, uncaught exceptions and refused loads.
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a DevTools method and note what the page complains about meanwhile."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(_PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def open(self, url: str, width: int = 1280, height: int = 900, phone: bool = False) -> None:
        """Go to a page as a screen of that size shows it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Page.navigate", url=url)
        host = urlsplit(url).netloc.rpartition("@")[2]
        self.wait_for(f"location.host == '{host}' && document.readyState == 'complete'")

    def value(self, expression: str) -> Any:
        """Return what JavaScript evaluates to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Evaluate until it is true."""
        end_s = time.monotonic() + _PATIENCE_S
        while not (value := self.value(expression)):
            assert time.monotonic() < end_s, f"never: {expression}; {self.complaints}"
            time.sleep(0.05)
        return value

    def picture(self, path: Path) -> None:
        """Write what is on the screen, and below it, as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        kind, said = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.complaints.append(str(said["args"]))
        elif kind == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url')}")


@contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """Yield a tab of a new browser; skips the test where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    process = subprocess.Popen(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={profile}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        told = profile / "DevToolsActivePort"
        end_s = time.monotonic() + _PATIENCE_S
        while not (told.is_file() and "\n" in told.read_text()):
            assert process.poll() is None and time.monotonic() < end_s, "chromium does not start"
            time.sleep(0.05)
        port = told.read_text().splitlines()[0]
        tabs = requests.get(f"http://127.0.0.1:{port}/json/list", timeout=20).json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(20)

"""Headless Chromium without a driver: its own protocol over a pair of pipes, and in real time.

(Virtual time, `--virtual-time-budget`, does not wait for a worker that computes.)
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-pipe"),
]
START = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"


class Page:
    """One page at a time: what it loads, what runs in it, and what it complains of."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write, self.waiting = read, write, b""
        self.count, self.session, self.target, self.complaints = 0, None, None, []

    def message(self) -> dict:
        """Return the next message; what is an error of the page's is noted."""
        while b"\0" not in self.waiting:
            piece = os.read(self.read, 1 << 20)
            assert piece, "chromium has gone"
            self.waiting += piece
        text, self.waiting = self.waiting.split(b"\0", 1)
        message = json.loads(text)
        shown = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = shown["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            if "THEBE_JS_URL" not in text:  # the theme declares it twice, on every page
                self.complaints.append(text)
        if message.get("method") == "Log.entryAdded" and shown["entry"]["level"] == "error":
            self.complaints.append(shown["entry"]["text"])
        return message

    def call(self, method: str, **parameters: object) -> dict:
        """Return the result of a method of the protocol."""
        self.count += 1
        order = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            order["sessionId"] = self.session
        os.write(self.write, json.dumps(order).encode() + b"\0")
        while (answer := self.message()).get("id") != self.count:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, url: str, width: int = 1400, height: int = 1000, **media: str) -> None:
        """Load ``url`` in a new window of that size; ``media`` are features such as prefers_color_scheme."""
        self.session, before, self.complaints = None, self.target, []
        self.target = self.call("Target.createTarget", url="about:blank")["targetId"]
        if before:
            self.call("Target.closeTarget", targetId=before)
        self.session = self.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.bringToFront")  # keys reach no other page
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState !== 'loading'")

    def run(self, script: str) -> object:
        """Return the value of ``script``, an expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 120) -> None:
        """Wait until ``script`` is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"after {seconds} s still not {script}; {self.complaints}"
            time.sleep(0.1)

    def key(self, key: str, code: int) -> None:
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, file: Path) -> None:
        """Write the whole page as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def chromium(profile: Path):
    """Yield a `Page` of a Chromium that ends with the block; ``profile`` is an empty folder."""
    (child_reads, we_write), (we_read, child_writes) = os.pipe(), os.pipe()
    # Chromium reads from descriptor 3 and writes to 4, which may be those of another pipe here.
    theirs = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (child_reads, child_writes)]
    os.close(child_reads)
    os.close(child_writes)
    command = [sys.executable, "-c", START, *map(str, theirs), CHROMIUM, f"--user-data-dir={profile}", *FLAGS]
    process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL)
    for descriptor in theirs:
        os.close(descriptor)
    try:
        yield Page(we_read, we_write)
    finally:
        process.terminate()
        process.wait(30)
        os.close(we_read)
        os.close(we_write)

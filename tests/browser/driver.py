"""Chromium, driven by Playwright: that of the system, found in PATH or named by LOCALGPT_CHROMIUM.

Nothing is downloaded. Run as a script, this file says so where there is no browser.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("LOCALGPT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
MISSING = {
    "playwright": find_spec("playwright") is None,
    f"a browser ({', '.join(NAMES)}, or LOCALGPT_CHROMIUM)": CHROMIUM is None,
}
WHY_NOT = " and ".join(what for what, missing in MISSING.items() if missing)
SECONDS = 120  # a model trains in one of the pages, on a machine that may be busy


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Yield a Chromium that ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        yield browser
        browser.close()


def watch(page: "Page", home: str) -> list[str]:
    """Return a list that will hold what goes wrong on ``page``: errors, and what it asks of elsewhere.

    ``home`` is the address below which everything lies that the page may load.
    """
    complaints: list[str] = []

    def ask(url: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            complaints.append(f"asks for {url}")

    page.on("request", lambda request: ask(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    return complaints


if __name__ == "__main__" and WHY_NOT:
    print(f"    but those of the pages in a browser, which were left out for want of {WHY_NOT}")
    sys.exit(0)

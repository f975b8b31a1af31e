"""What the tests in a browser share: the built book, one Chromium, and windows that close after each test.

Without LOCALGPT_SITE the tests look at _build/html and are skipped when there is none, as those of
tests/book/test_site.py are.
"""

import functools
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from driver import SECONDS, WHY_NOT, chromium, watch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site() -> Path:
    named = os.environ.get("LOCALGPT_SITE")
    site = ROOT / (named or "_build/html")
    if not (site / "index.html").exists():
        (pytest.fail if named else pytest.skip)(f"there is no built book in {site}; run make html")
    return site


@pytest.fixture(scope="session")
def browser():
    if WHY_NOT:
        pytest.skip(f"needs {WHY_NOT}")
    with chromium() as found:
        yield found


class Server(SimpleHTTPRequestHandler):
    """Serves files, says nothing, and has no icon for the tab, which a browser asks for unbidden."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture(scope="session")
def served(site):
    """The address of the book on a server of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def visit(browser, site):
    """Return a function that opens a page of the book, "book/notation.html#a", in a window of its own.

    ``home`` is where the book is, by default on the disk; ``options`` are those of a context of Playwright.
    When the test is over, no page may have met an error or asked for anything elsewhere.
    """
    complaints = []

    def opened(path: str, width: int = 1400, height: int = 1000, home: str = site.as_uri(), **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(1000 * SECONDS)
        page = context.new_page()
        complaints.append(watch(page, home))
        page.goto(f"{home}/{path}")
        return page

    yield opened
    for context in browser.contexts:
        context.close()
    assert sum(complaints, []) == []

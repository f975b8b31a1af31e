"""The book in a real JupyterLab: a chapter is shown as on its page, and a page runs from top to bottom."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from driver import SECONDS, watch

pytestmark = pytest.mark.book

ROOT = Path(__file__).parents[2]
# The model of the open notebook, since JupyterLab draws only the cells that are in the window.
MODEL = "window.jupyterapp?.shell.currentWidget?.content?.model"
OUTPUTS = f"""[...{MODEL}.cells].filter((cell) => cell.type === "code")
    .map((cell) => [cell.executionCount, cell.outputs.toJSON()])"""
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
READY = f"{MODEL}?.cells?.length > 5 && {KERNEL}"


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory):
    """Start JupyterLab on a copy of the book, as `make lab` does, and return its address."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "book", root / "book", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--LabApp.app_settings_dir=book/_lab", "--ServerApp.port=0", "--IdentityProvider.token=x"]
    said = root / "said"
    with open(said, "w") as file:
        server = subprocess.Popen(command, cwd=root, stdout=file, stderr=file, start_new_session=True)
    end = time.monotonic() + SECONDS
    while not (found := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+", said.read_text())):
        assert time.monotonic() < end and server.poll() is None, said.read_text()
        time.sleep(0.2)
    yield found[0]
    server.terminate()
    # A server that still starts a kernel may not hear it; nothing of it is needed any more.
    with suppress(subprocess.TimeoutExpired):
        server.wait(timeout=10)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(timeout=SECONDS)


@pytest.fixture
def notebook(browser, jupyterlab):
    """Open a notebook of the book, and see that it asks for nothing from elsewhere."""
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        complaints = watch(page, jupyterlab)

        def opened(path: str):
            page.goto(f"{jupyterlab}/lab/tree/{path}?token=x&reset")
            page.wait_for_function(READY)
            return page

        yield opened
        # What else JupyterLab complains of, such as links to what other pages define, is its own affair.
        assert [complaint for complaint in complaints if complaint.startswith("asks for")] == []


def test_a_chapter_is_shown_as_on_its_page(notebook):
    page = notebook("book/chapters/04-sign-symmetry.ipynb")
    page.wait_for_selector(".jp-MarkdownCell h1")
    assert page.locator(".jp-MarkdownCell h1").first.text_content().strip().startswith("Sign symmetry")
    page.wait_for_selector(".jp-Notebook mjx-container, .jp-Notebook .katex")
    assert len(said_in(page)) > 5
    text = page.locator(".jp-Notebook").inner_text()
    assert not re.search(r"\{(?:glue|math|eq|ref|cite|term)", text)


def said_in(page) -> list[str]:
    """Return the sentences with results, as the notebook holds them."""
    shown = [output for _, outputs in page.evaluate(OUTPUTS) for output in outputs]
    return [
        "".join(output["data"]["text/markdown"])
        for output in shown
        if "text/markdown" in output.get("data", {})
    ]


def test_a_page_runs_from_top_to_bottom(notebook):
    page = notebook("book/intro.ipynb")
    before = said_in(page)
    page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    assert said_in(page) == []
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(f"{OUTPUTS}.every(([count]) => count !== null)")
    page.wait_for_function(f"{KERNEL}.status === 'idle'")
    kinds = {output["output_type"] for _, outputs in page.evaluate(OUTPUTS) for output in outputs}
    assert "error" not in kinds and "stream" not in kinds
    assert said_in(page) == before and len(before) > 1

"""What a page loads that asks for an interactive part, what another page loads, and what the build writes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book/_ext"))
import interactive  # noqa: E402  no package


def files(page: str, asked: list[str]) -> list[str]:
    return ["part.css", f"{page}.js", *(f"{name}.js" for name in asked)]


def written(book: Path, pages: dict[str, list[str]]) -> dict[str, str]:
    return {"made/part.js": f"part({pages})"}


@pytest.fixture
def part():
    def asked(doctree):
        return [div["data-name"] for div in interactive.elements(doctree, "part")]

    return interactive.Interactive("part", asked, files, written)


@pytest.fixture
def app(tmp_path):
    loaded, connected = [], {}
    return SimpleNamespace(
        env=SimpleNamespace(docname="page", metadata={"page": {}, "other": {}}),
        builder=SimpleNamespace(format="html"),
        srcdir=tmp_path,
        outdir=tmp_path,
        loaded=loaded,
        add_css_file=loaded.append,
        add_js_file=lambda file, loading_method: loaded.append((file, loading_method)),
        connected=connected,
        connect=connected.__setitem__,
    )


def page(*html: str) -> nodes.Node:
    return nodes.section("", *(nodes.raw("", text, format="html") for text in html))


def test_elements_are_those_of_the_class():
    found = interactive.elements(page('<div class="part" id="a"></div>', '<p class="part">apart</p>'), "part")
    assert [element["id"] for element in found] == ["a"]


def test_a_page_that_asks_loads_its_files_and_another_page_nothing(part, app):
    part.note(app, page('<div class="part" data-name="one"></div>'))
    assert app.env.metadata == {"page": {"part": ["one"]}, "other": {}}
    part.load(app, "other", "", {}, None)
    assert app.loaded == []
    part.load(app, "page", "", {}, None)
    assert app.loaded == ["part.css", ("page.js", "defer"), ("one.js", "defer")]


def test_what_is_made_is_written_once_if_a_page_asks(part, app, tmp_path):
    made = tmp_path / "_static/made/part.js"
    part.write(app, None)
    assert not made.exists()
    app.env.metadata["page"]["part"] = ["one"]
    part.write(app, ValueError("the build failed"))
    app.builder.format = "latex"
    part.write(app, None)
    assert not made.exists()
    app.builder.format = "html"
    part.write(app, None)
    assert made.read_text() == "\"use strict\";\npart({'page': ['one']})\n"


def test_all_three_are_registered(part, app):
    assert part.register(app)["parallel_read_safe"]
    assert [*app.connected] == ["doctree-read", "html-page-context", "build-finished"]

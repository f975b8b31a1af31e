"""The figures of the book, drawn again: which code they need, and that it gives the page's picture."""

import base64
import functools
import io
import json
import os
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import localgpt_core.corpus.ngrams
import localgpt_core.report.results
from localgpt_core.cli.figures import book_figures, needed_code, page_figures

BOOK = Path(__file__).parents[2] / "book"
FIGURES = book_figures(BOOK)
RECORDED = [name for name, figure in FIGURES.items() if figure.suites and not figure.live]


# ------------------------------------------------------------------------------- the code that a figure needs


HELPER = "def f(x):\n    t = x\n    return t + a\n"


@pytest.mark.parametrize(
    ("above", "cell", "needed"),
    [
        ("a = 1\nb = 2", "draw(a)", "a = 1\ndraw(a)"),
        ("b = 2\na = b\nc = 3", "draw(a)", "b = 2\na = b\ndraw(a)"),
        ("a = 1\na = 2", "draw(a)", "a = 2\ndraw(a)"),  # an earlier value does not matter
        ("a = 1\na = a + 1", "draw(a)", "a = 1\na = a + 1\ndraw(a)"),
        ("a = 1\na += 1", "draw(a)", "a = 1\na += 1\ndraw(a)"),
        ("a = []\na.append(1)\nprint(a)", "draw(a)", "a = []\na.append(1)\ndraw(a)"),
        ("a = {}\na['x'].y = 1", "draw(a)", "a = {}\na['x'].y = 1\ndraw(a)"),
        ("a, b = (load('x'), load('y'))", "draw(b)", "b = load('y')\ndraw(b)"),
        ("a, b = (1, 2)\na, b = (b, a)", "draw(a)", "a = 1\nb = 2\na, b = (b, a)\ndraw(a)"),
        ("a, *b = (1, 2, 3)", "draw(b)", "a, *b = (1, 2, 3)\ndraw(b)"),
        ("import m, o\nfrom x import y, z as w", "w(m.pi)", "import m\nfrom x import z as w\nw(m.pi)"),
        ("a = 1\nfor x in [2]:\n    a += x", "draw(a)", "a = 1\nfor x in [2]:\n    a += x\ndraw(a)"),
        ("x = 1\nfor x in [2]:\n    y = x", "draw(y)", "for x in [2]:\n    y = x\ndraw(y)"),
        ("x = 1\na = 3", "draw([x + a for x in b])", "a = 3\ndraw([x + a for x in b])"),
        ("x = 1\na = 3\n" + HELPER, "f(0)", "a = 3\n" + HELPER + "f(0)"),
        ("a = 1", "b = 2\nprint('a', a)\nplt.show()", "b = 2"),
        ("a = 1", "for k in [1]:\n    print(k, a)\ndraw()", "draw()"),
        ("told = {}\na = 1\ntold['a'] = a", "told['b'] = 2\ndraw(a)", "a = 1\ndraw(a)"),
        ("draw(a)\na = 1", "draw(a)", "a = 1\ndraw(a)"),  # a drawing above changes nothing
    ],
)
def test_needed_code(above, cell, needed):
    assert needed_code([above], cell).strip() == needed


def test_a_damaged_page_costs_its_own_figures(tmp_path):
    page = json.dumps({"cells": [cell("draw()", "whole")]})
    (tmp_path / "a.ipynb").write_text(page)
    odd = ["", "[" * 5000, "[]", "5", "{}", '{"cells": 5}', page[:-3], page.replace("draw()", "draw(")]
    for number, text in enumerate(odd):
        (tmp_path / f"b{number}.ipynb").write_text(text)
    os.mkfifo(tmp_path / "c.ipynb")
    problems = []
    assert [*book_figures(tmp_path, problems.append)] == ["whole"]
    names = [re.search(r"page .*/(\w+)\.ipynb is left out: ", problem)[1] for problem in problems]
    assert names == [f"b{number}" for number in range(len(odd))] + ["c"]


def cell(source: str, name: str | None = None) -> dict:
    about = {"mystnb": {"figure": {"name": name, "caption": "C."}}} if name else {}
    return {"cell_type": "code", "metadata": about, "source": [source]}


def test_a_figure_says_its_suites_and_whether_it_is_live():
    cells = [
        cell("live = train(config)\na, b = load_results('one'), load_results('two', preset='gpu')"),
        {"cell_type": "markdown", "metadata": {}, "source": "c = load_results('three')"},
        cell("draw(b)", "recorded"),
        cell("draw(live, a, b)", "both"),
        cell("draw()", "neither"),
    ]
    found = {figure.name: figure for figure in page_figures(cells, Path("x.ipynb"))}
    assert {name: (figure.suites, figure.live) for name, figure in found.items()} == {
        "recorded": (("two",), False),
        "both": (("one", "two"), True),
        "neither": ((), False),
    }
    assert (found["both"].page, found["both"].caption) == (Path("x.ipynb"), "C.")


# ------------------------------------------------------------------------------------ the figures of the book


def pictures() -> dict[str, str]:
    """Return the picture of every figure as it is committed."""
    found = {}
    for page in BOOK.rglob("*.ipynb"):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            name = cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
            for output in cell.get("outputs", []):
                if name and "image/svg+xml" in output.get("data", {}):
                    found[name] = "".join(output["data"]["image/svg+xml"])
    return found


PICTURES = pictures()


def parts(svg: str) -> tuple[str, list[float], list[np.ndarray]]:
    """Return a drawing without its numbers, which may differ in their last digit, these, and its maps."""
    maps = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]*)", svg)]
    names = re.sub(r"base64,[^\"]*|(?<=[\"#])[mpC][0-9a-f_]{10,}", "", svg)
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    pixels = [matplotlib.image.imread(io.BytesIO(png)) for png in maps]
    return re.sub(number, "", names), [*map(float, re.findall(number, names))], pixels


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Read texts and records once, and not for each figure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localgpt_core, "load_corpus", functools.cache(localgpt_core.load_corpus), raising=False)
        for module, name in (
            (localgpt_core.corpus.ngrams, "floors"),
            (localgpt_core.report.results, "load_results"),
        ):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


def test_every_picture_of_the_book_has_a_name_of_its_own():
    assert FIGURES.keys() == PICTURES.keys()
    assert len(RECORDED) > 50


@pytest.mark.parametrize("name", RECORDED)
def test_a_figure_from_records_is_drawn_again_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(BOOK)
    FIGURES[name].draw(tmp_path / "again.svg")
    again, committed = parts((tmp_path / "again.svg").read_text()), parts(PICTURES[name])
    assert again[0] == committed[0]
    assert again[1] == pytest.approx(committed[1], rel=1e-4, abs=1e-3)
    for ours, theirs in zip(again[2], committed[2], strict=True):
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 1e-3


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def in_book(cli, monkeypatch):
    """Return the command line, run inside of the book."""
    monkeypatch.chdir(BOOK / "chapters")
    monkeypatch.delenv("LOCALGPT_CACHE")
    return cli


def test_figures_are_listed_with_page_and_suite(in_book):
    status, out, _ = in_book("figure")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == RECORDED
    assert re.search(r"(?m)^ch03-curves +03-feedback-alignment, suite feedback-alignment$", out)


def test_a_figure_is_drawn_by_its_name_and_never_over_a_file(in_book, tmp_path):
    out = tmp_path / "rates.png"
    assert in_book("figure", "ch02-rates", "--out", out)[0] == 0
    height, width, _ = matplotlib.image.imread(out).shape
    assert width > 600 and height > 300
    out.write_bytes(b"mine")
    status, _, err = in_book("figure", "ch02-rates", "--out", out)
    assert status == 2 and "--overwrite" in err and out.read_bytes() == b"mine"
    assert in_book("figure", "ch02-rates", "--out", out, "--overwrite")[0] == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert in_book("figure", "ch02-rates", "--out", tmp_path / "rates.pdf")[0] == 0
    assert (tmp_path / "rates.pdf").read_bytes()[:5] == b"%PDF-"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["ch99"], "name='ch99': is no figure of the book; localgpt figure lists them"),
        (["ch03-live"], "run book/chapters/03-feedback-alignment.ipynb"),  # trains
        (["ch03-paths"], "is not drawn from records"),  # a drawing without data
        (["ch02-rates", "--out", "rates.gif"], r"must end in .png, .pdf or .svg"),
    ],
)
def test_what_cannot_be_drawn_is_refused(in_book, arguments, error):
    status, out, err = in_book("figure", *arguments)
    assert status == 2 and not out and error in err


def test_outside_of_the_checkout_there_is_no_figure(cli):
    status, _, err = cli("figure", "ch02-rates")
    assert status == 2 and "must be inside the checkout" in err

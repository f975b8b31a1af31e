"""The built pages: run after `make html`, by `make check-site`.

Without LOCALGPT_SITE the tests look at _build/html and are skipped when there is none. The Makefile sets it,
and then a missing build is a failure.
"""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from book_checks import site_problems, stylesheet_problems

pytestmark = pytest.mark.book

ROOT = Path(__file__).parents[2]


def toc_pages() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]


@pytest.fixture(scope="module")
def site() -> Path:
    named = os.environ.get("LOCALGPT_SITE")
    site = ROOT / (named or "_build/html")
    if not (site / "index.html").exists():
        if named:
            pytest.fail(f"there is no built book in {named}; run make html")
        pytest.skip("the book is not built")
    return site


@pytest.mark.parametrize("page", toc_pages())
def test_page_is_complete_and_loads_nothing_from_outside(site, page):
    assert site_problems(site / f"{page}.html", site) == []


def test_stylesheets_load_nothing_from_outside(site):
    found = {str(sheet.relative_to(site)): stylesheet_problems(sheet) for sheet in site.rglob("*.css")}
    assert found and {name: faults for name, faults in found.items() if faults} == {}


def test_mathematics_is_shown_without_a_network(site):
    notation = (site / "book/notation.html").read_text()
    assert notation.count('class="math') > 20
    assert "_static/mathjax/" in notation
    assert list((site / "_static/mathjax").rglob("*.woff")), "MathJax has no fonts"


FAULTS = {
    "a script from outside": (
        "</head>",
        '<script src="https://example.org/a.js"></script></head>',
        "loads https",
    ),
    "a style from outside": (
        "</head>",
        '<link rel="stylesheet" href="//example.org/a.css"></head>',
        "loads //",
    ),
    "an imported font": ("</head>", "<style>@import url(https://example.org/f.css)</style></head>", "inline"),
    "an image from outside": (
        "</article>",
        '<img src="http://example.org/x.png" alt="a"></article>',
        "loads http",
    ),
    "an image without alt": ("</article>", '<img src="x.png"></article>', "alt text"),
    "a file name as alt": (
        "</article>",
        '<img src="x.png" alt="../_images/0123456789abcdef0123.png"></article>',
        "alt",
    ),
    "no description": ('name="description"', 'name="other"', "no description"),
    "a second search box": ("</body>", '<input type="search"></body>', "2 search boxes"),
    "an empty button": ("</body>", '<button class="btn"></button></body>', "empty button"),
    "a dead link": ("</article>", '<a href="nowhere.html">x</a></article>', "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_checks_see_a_planted_fault(site, tmp_path, fault):
    before, after, message = FAULTS[fault]
    page = tmp_path / "site/book/notation.html"
    shutil.copytree(site, tmp_path / "site", ignore=shutil.ignore_patterns("locales", "output", "a11y"))
    text = page.read_text()
    assert before in text
    page.write_text(text.replace(before, after, 1))
    found = site_problems(page, tmp_path / "site")
    assert any(message in problem for problem in found), found


def test_checks_see_a_chapter_that_counts_otherwise(site, tmp_path):
    page = tmp_path / "chapters/07-notation.html"
    page.parent.mkdir()
    page.write_text((site / "book/chapters/06-grape.html").read_text())
    found = [problem for problem in site_problems(page, tmp_path) if "count" in problem]
    assert any("6. GrAPE" in problem for problem in found) and any("Fig. 6.1" in problem for problem in found)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("Table 6.2 ", "Table 7.2 ", "does not count with its number: Table 7.2"),
        ('<span class="caption-number">Table 6.2 </span>', "", "a table without a number: T_ch06-cost"),
        (">Table 6.5<", ">Table 6.4<", "calls Table 6.4 what is Table 6.5: #T_ch06-growth-table"),
    ],
)
def test_checks_see_a_table_with_another_number(site, tmp_path, before, after, message):
    page = tmp_path / "chapters/06-grape.html"
    page.parent.mkdir()
    text = (site / "book/chapters/06-grape.html").read_text()
    assert before in text
    page.write_text(text.replace(before, after, 1))
    assert any(message in problem for problem in site_problems(page, tmp_path))


def test_a_page_weighs_what_is_sent_for_it_once(tmp_path):
    content = os.urandom(1_400_000)
    for name in ("a.png", "dark.svg", "late.woff"):
        (tmp_path / name).write_bytes(content)
    page = tmp_path / "page.html"
    images = '<img src="a.png" alt="a"><img src="a.png" alt="b"><img class="in-dark" src="dark.svg" alt="c">'
    page.write_text(images)
    assert not any("weighs" in problem for problem in site_problems(page, tmp_path))
    page.write_text(images.replace(' class="in-dark"', ""))
    assert "weighs 2.80 MB" in site_problems(page, tmp_path)


def test_checks_see_missing_mathjax(site, tmp_path):
    page = tmp_path / "notation.html"
    page.write_text((site / "book/notation.html").read_text().replace("mathjax", "other"))
    assert "has mathematics and no MathJax" in site_problems(page, tmp_path)


def test_stylesheet_check_sees_a_planted_import(tmp_path):
    sheet = tmp_path / "x.css"
    sheet.write_text('@import "https://example.org/a.css"; a { background: url(//example.org/b.png) }')
    assert len(stylesheet_problems(sheet)) == 2

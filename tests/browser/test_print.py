"""The book on paper: one file, with contents, page numbers, and links that lead within it."""

import re
import sys
from pathlib import Path

import pytest
from test_pages import toc_pages

pytestmark = pytest.mark.book

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="module")
def print_book():
    import print_book  # a script; needs pypdf

    return print_book


@pytest.fixture(scope="module")
def pages(print_book, site):
    return print_book.pages_of(site)


@pytest.fixture(scope="module")
def book(browser, print_book, pages, tmp_path_factory):
    """Print three pages, of two parts and none, and return them as pypdf reads them."""
    from pypdf import PdfReader

    wanted = ("intro.html", "notation.html", "glossary.html")
    chosen = [page for page in pages if page.path.name in wanted]
    file = tmp_path_factory.mktemp("print") / "book.pdf"
    assert print_book.print_book(browser, file, chosen) == len(PdfReader(file).pages)
    return PdfReader(file)


def test_the_pages_are_those_of_the_table_of_contents(pages, site):
    assert [str(page.path) for page in pages] == [
        str((site / f"{name}.html").resolve()) for name in toc_pages()
    ]
    assert [page.part for page in pages[:3]] == ["", "Ground", ""]


def test_every_page_has_its_number_and_the_contents_name_it(book):
    texts = [page.extract_text() for page in book.pages]
    assert [text.split()[-1] for text in texts] == [str(number + 1) for number in range(len(texts))]
    rows = dict(re.findall(r"(?m)^(Start here|Notation|Glossary)\D*(\d+)$", texts[0]))
    assert len(rows) == 3
    for title, number in rows.items():
        heading = {"Start here": "Learning without"}.get(title, title)
        assert heading in texts[int(number) - 1]


def test_the_outline_leads_to_the_pages(book):
    found = [item for item in book.outline if not isinstance(item, list)]
    assert [item.title for item in found] == ["Contents", "Start here", "Notation", "Glossary"]
    places = [book.get_destination_page_number(item) for item in found]
    assert places[:2] == [0, 1] and places == sorted({*places})


def test_links_lead_within_the_file_or_to_the_network(book):
    links = [link.get_object() for page in book.pages for link in page.get("/Annots", [])]
    addresses = [str(link["/A"]["/URI"]) for link in links if "/URI" in link.get("/A", {})]
    assert not [address for address in addresses if address.startswith("file:")]
    inside = [link for link in links if link.get("/A", {}).get("/S") == "/GoTo"]
    glossary = book.get_destination_page_number(book.outline[-1])
    assert glossary in [book.get_page_number(link["/A"]["/D"][0].get_object()) for link in inside]


def test_the_intro_is_linked_with_the_file(print_book, site, tmp_path):
    (tmp_path / "book").mkdir()
    intro = tmp_path / "book/intro.html"
    intro.write_text((site / "book/intro.html").read_text(encoding="utf-8"), encoding="utf-8")
    assert (
        f"{print_book.NAME}" not in intro.read_text(encoding="utf-8")
        or print_book.LINKED in intro.read_text()
    )
    print_book.link_from_intro(tmp_path)
    assert f'<a href="../{print_book.NAME}">' in intro.read_text(encoding="utf-8")

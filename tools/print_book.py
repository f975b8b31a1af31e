"""Print the built book as one PDF: contents, page numbers, and links that lead within the file.

`python tools/print_book.py`, after `make html`, writes `localgpt.pdf` into the built book and links it from
the intro. Each page is printed by the Chromium of the system, as a reader would print it in light colours;
pypdf joins them.
"""

import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, NameObject

from localgpt_core.common.files import atomic_write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/browser"))
from driver import WHY_NOT, chromium  # noqa: E402  which finds the browser for the tests, too

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
NAME = "localgpt.pdf"
# What stands in the intro as long as there is no such file, and then.
WITHOUT = '<p class="as-pdf"></p>'
LINKED = f'<p class="as-pdf">The book as <a href="../{NAME}">one PDF</a>.</p>'
MARGINS = {"top": "18mm", "bottom": "20mm", "left": "17mm", "right": "17mm"}
SCALE = 0.85  # 85 columns of code in the width of A4
# What a page fetches only when it is looked at, it needs now; formulas are set when the promise is kept.
READY = """async () => {
    for (const image of document.images) image.loading = 'eager';
    await Promise.all([...document.images].map(image => image.decode().catch(() => {})));
    if (window.MathJax) await MathJax.startup.promise;
}"""
SHEET = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 12pt sans-serif; margin: 0 }}
h1 {{ font-size: 22pt }}
h2 {{ font-size: 12pt; margin: 1em 0 .3em }}
p {{ display: flex; margin: .25em 0 }}
p span {{ flex: 1; border-bottom: 1px dotted #888; margin: 0 .5em .3em }}
.number {{ break-after: page; height: 296mm; position: relative }}
.number:last-child {{ break-after: auto }}
.number div {{ position: absolute; bottom: 8mm; width: 100%; text-align: center; font-size: 9pt }}
</style><body>{body}</body></html>"""


@dataclass
class Page:
    """A page of the book: the part that it opens, its title, its file, and once printed its PDF and place."""

    part: str
    title: str
    path: Path
    pdf: bytes = b""
    start: int = 0


def pages_of(site: Path) -> list[Page]:
    """Return the pages in the order of the contents that stand beside each of them."""
    intro = site / "book/intro.html"
    links = BeautifulSoup(intro.read_text(encoding="utf-8"), "html.parser").select_one("nav.bd-links")
    found, part = [], ""
    for item in links.select("p.caption, li.toctree-l1 > a"):
        words = item.get_text(" ", strip=True)
        if item.name == "p":
            part = words
            continue
        found.append(Page(part, words, (intro.parent / item["href"].partition("#")[0]).resolve()))
        part = ""
    if found and found[0].path != intro.resolve():
        found.insert(0, Page("", "Start here", intro.resolve()))
    return [page for page in found if page.path.is_file()]


def printed(browser, address: str, **options: object) -> bytes:
    """Return the PDF of what is at ``address``."""
    page = browser.new_page(color_scheme="light")
    page.goto(address)
    page.emulate_media(media="print", color_scheme="light")
    page.evaluate(READY)
    pdf = page.pdf(format="A4", **{"margin": MARGINS, "scale": SCALE, "print_background": True} | options)
    page.close()
    return pdf


def sheet(browser, folder: Path, title: str, body: str, **options: object) -> bytes:
    """Return the PDF of a page that is made here."""
    file = folder / "sheet.html"
    file.write_text(SHEET.format(title=title, body=body), encoding="utf-8")
    return printed(browser, file.as_uri(), scale=1, **options)


def count(pdf: bytes) -> int:
    """Return the number of pages."""
    return len(PdfReader(io.BytesIO(pdf)).pages)


def contents(pages: list[Page], title: str) -> str:
    """Return the HTML of the contents."""
    rows = [f"<h1>{html.escape(title)}</h1>"]
    for page in pages:
        rows += [f"<h2>{html.escape(page.part)}</h2>"] * bool(page.part)
        rows.append(f"<p>{html.escape(page.title)}<span></span>{page.start + 1}</p>")
    return "".join(rows)


def joined(pages: list[Page], front: bytes, numbers: bytes) -> PdfWriter:
    """Return the pages behind the contents ``front``, each with its number, in one file."""
    writer, stamps = PdfWriter(), PdfReader(io.BytesIO(numbers))
    writer.append(io.BytesIO(front), "Contents", import_outline=False)
    part = None
    for page in pages:
        writer.append(io.BytesIO(page.pdf), import_outline=False)
        if page.part:
            part = writer.add_outline_item(page.part, page.start)
        writer.add_outline_item(page.title, page.start, parent=part)
    places = {page.path: page.start for page in pages}
    for number, stamp in enumerate(stamps.pages):
        writer.pages[number].merge_page(stamp)
        writer.pages[number].compress_content_streams()  # which merging has unpacked
        lead_within(writer, number, places)
    writer.compress_identical_objects()
    return writer


def lead_within(writer: PdfWriter, number: int, places: dict[Path, int]) -> None:
    """Let the links of a page that lead to pages of the book lead there; drop those to other files."""
    links = writer.pages[number].get("/Annots", ArrayObject())
    for place, reference in reversed([*enumerate(links)]):
        link = reference.get_object()
        address = urlsplit(str(link.get("/A", {}).get("/URI", "")))
        if address.scheme != "file":
            continue
        target = places.get(Path(unquote(address.path)))
        if target is None:
            del links[place]
        else:
            there = ArrayObject([writer.pages[target].indirect_reference, NameObject("/Fit")])
            action = {NameObject("/S"): NameObject("/GoTo"), NameObject("/D"): there}
            link[NameObject("/A")] = DictionaryObject(action)


def print_book(browser, out: Path, pages: list[Page]) -> int:
    """Write the PDF of ``pages`` and return how many sheets it has."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for page in pages:
            page.pdf = printed(browser, page.path.as_uri())
        title = CONFIG["title"]
        start = count(sheet(browser, folder, title, contents(pages, title)))
        for page in pages:
            page.start, start = start, start + count(page.pdf)
        front = sheet(browser, folder, title, contents(pages, title))
        stamps = "".join(f'<div class="number"><div>{number + 1}</div></div>' for number in range(start))
        flush = dict.fromkeys(MARGINS, "0")
        numbers = sheet(browser, folder, title, stamps, margin=flush, print_background=False)
    writer = joined(pages, front, numbers)
    writer.add_metadata({"/Title": title, "/Author": CONFIG["author"]})
    file = io.BytesIO()
    writer.write(file)
    atomic_write(out, file.getvalue())
    return start


def link_from_intro(site: Path) -> None:
    """Write a link to the file into the intro."""
    intro = site / "book/intro.html"
    text = intro.read_text(encoding="utf-8")
    intro.write_text(text.replace(WITHOUT, LINKED), encoding="utf-8")


def main() -> None:
    """Print the book in _build/html, or in the folder that is named."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_build/html").resolve()
    if WHY_NOT:
        sys.exit(f"printing needs {WHY_NOT}")
    if not (site / "book/intro.html").is_file():
        sys.exit(f"there is no built book in {site}; run make html")
    with chromium() as browser:
        sheets = print_book(browser, site / NAME, pages_of(site))
    link_from_intro(site)
    print(f"{site / NAME}: {sheets} pages, {(site / NAME).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

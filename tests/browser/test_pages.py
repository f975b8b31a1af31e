"""Every page of the built book in narrow and wide windows, in the light and the dark theme, and on paper."""

from pathlib import Path

import pytest
import yaml
from driver import SECONDS, watch

pytestmark = pytest.mark.book

ROOT = Path(__file__).parents[2]
AXE = Path(__file__).parent / "vendor/axe-core/axe.min.js"
OTHERS = ["genindex", "search", "py-modindex", "_modules/index", "_modules/localgpt_core/layers/linear"]
# Of the violations those that keep somebody from reading or using a page. Formulas are thousands of elements,
# all of MathJax's making.
VIOLATIONS = """async (rules) => {
    const options = {resultTypes: ["violations"], preload: false, elementRef: false, ...rules};
    const found = await axe.run({exclude: "mjx-container"}, options);
    return found.violations.filter(({impact}) => ["serious", "critical"].includes(impact))
        .flatMap(({id, nodes}) => nodes.map(({target, failureSummary}) =>
            `${id}: ${target.join(" ")}: ${failureSummary.split("\\n")[1]}`));
}"""
# A narrow window has the markup and the colours of a wide one; what scrolls in it, and what can be seen and
# has to have a name, differs. A theme changes nothing but colours.
NARROW = {"runOnly": ["scrollable-region-focusable", "button-name", "link-name", "aria-hidden-focus"]}
RULES = {
    ("light", 1400): {},
    ("light", 768): NARROW,
    ("light", 390): NARROW,
    ("dark", 390): None,
    ("dark", 768): None,
    ("dark", 1400): {"runOnly": ["color-contrast"]},
}
SETTLED_MS = 500  # the theme looks again which code scrolls, a while after the window has changed
# What sticks out of the window although nothing around it scrolls: named, so that a failure says what it is.
WIDER = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
    [...document.querySelectorAll("body *:not(pre *)")]
        .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
        .map((one) => `${one.tagName}.${one.className}`).slice(0, 9)"""

PAPER = round((210 - 34) / 25.4 * 96 / 0.85)  # CSS pixels of A4's text, printed as tools/print_book.py does
CUT = """() => [...document.querySelectorAll("article pre")].filter((one) => one.offsetParent)
    .filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.textContent.slice(0, 80))"""
# Of every drawing a page has one for each theme, and shows its own.
OF_THE_OTHER = """(theme) => [...document.querySelectorAll(theme === "dark" ? ".in-light" : ".in-dark")]
    .filter((one) => one.offsetParent).map((one) => one.getAttribute("alt").slice(0, 60))"""


def toc_pages() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]


def problems(page) -> list[str]:
    """Return what is wrong with a page, in every window and in both themes."""
    page.add_script_tag(path=AXE)
    found = []
    for (theme, width), rules in RULES.items():
        page.emulate_media(color_scheme=theme)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
        page.wait_for_timeout(SETTLED_MS)
        faults = [f"wider than the window: {what}" for what in page.evaluate(WIDER)]
        faults += [f"a drawing for the other theme: {alt}" for alt in page.evaluate(OF_THE_OTHER, theme)]
        faults += page.evaluate(VIOLATIONS, rules) if rules is not None else []
        found += [f"{theme}, {width} px: {fault}" for fault in faults]
    page.set_viewport_size({"width": PAPER, "height": 900})
    page.emulate_media(media="print", color_scheme="light")
    return found + [f"on paper: code is cut: {code}" for code in page.evaluate(CUT)]


@pytest.mark.parametrize("path", [*toc_pages(), *OTHERS])
def test_a_page_can_be_read_in_every_window(visit, path):
    assert problems(visit(f"{path}.html")) == []


FAULTS = {
    "a picture without a text": ("<img src='data:image/png;base64,iVBORw0KGgo='>", "image-alt"),
    "grey on grey": ("<p style='color: #888; background: #999'>words</p>", "color-contrast"),
    "a drawing in both themes": (
        "<img class='in-light' style='display: inline !important' alt='x' src='data:,'>"
        "<img class='in-dark' style='display: inline !important' alt='x' src='data:,'>",
        "drawing for the other",
    ),
    "code that paper cuts": (
        "<pre style='white-space: pre !important'>" + "x" * 200 + "</pre>",
        "code is cut",
    ),
    "a line that does not wrap": ("<p style='width: 2000px'>wide</p>", "wider than the window"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(visit, fault):
    html, message = FAULTS[fault]
    page = visit("book/glossary.html")
    page.evaluate("html => document.querySelector('article').insertAdjacentHTML('beforeend', html)", html)
    found = problems(page)
    assert found and all(message in problem for problem in found)


def test_errors_and_requests_to_elsewhere_are_noted(browser, site):
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        complaints = watch(page, site.as_uri())
        page.goto(f"{site.as_uri()}/book/glossary.html")
        page.evaluate("console.error('said'); setTimeout(() => { throw Error('thrown'); })")
        page.evaluate("fetch('http://127.0.0.1:9/x').catch(() => 0)")
        page.wait_for_timeout(1000)
    for one in ("said", "thrown", "asks for http://127.0.0.1:9/x", "Failed to load resource"):
        assert any(one in complaint for complaint in complaints), complaints


# From the disk the search finds the same pages; a browser then refuses it their texts, which it would quote.
def test_the_search_finds_a_word(visit, served):
    page = visit("book/intro.html", home=served)
    page.keyboard.press("Control+k")
    page.keyboard.type("Kolen-Pollack")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    assert "search.html" in page.url and "q=Kolen-Pollack" in page.url
    page.click("#search-results li a")
    assert "Kolen" in page.text_content("article")

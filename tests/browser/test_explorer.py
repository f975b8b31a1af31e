"""The explorer of recorded runs on its built page: opened from the disk and from a server."""

import re
from pathlib import Path

import pytest

from localgpt_core.experiments.suites import read_suite

pytestmark = pytest.mark.book

PAGE = "book/rules-compared.html"
ROWS = ".explorer-table tbody tr[data-arm]"
NAMES = f"[...document.querySelectorAll('{ROWS}')].map((row) => row.dataset.arm)"
LABEL = "document.querySelector('.explorer-figure').getAttribute('aria-label')"
MOST_BYTES = 300_000
ARMS = len(read_suite(Path(__file__).parents[2] / "book" / "suites" / "rules.toml").arms)


@pytest.fixture
def page(visit):
    page = visit(PAGE)
    page.wait_for_selector(".explorer canvas")
    return page


def picture(page, place: int = 0) -> str:
    return page.evaluate(f"document.querySelectorAll('.explorer canvas')[{place}].toDataURL()")


def test_the_table_is_sorted_by_a_column_and_back(page):
    def losses() -> list[float]:
        texts = page.locator(f"{ROWS} td:nth-child(3)").all_text_contents()
        return [float(text.split()[0]) for text in texts if text != "–"]

    first = losses()
    assert first == sorted(first) and len(first) > 10
    head = page.get_by_role("button", name=re.compile("^Final loss"))  # the page has "final loss" too
    column = page.locator("th[aria-sort]").filter(has=head)
    assert column.get_attribute("aria-sort") == "ascending"
    head.focus()
    page.keyboard.press("Enter")
    assert column.get_attribute("aria-sort") == "descending"
    assert losses() == sorted(first, reverse=True)
    page.get_by_role("button", name="Arm").click()
    assert column.get_attribute("aria-sort") == "none"
    labels = page.locator(f"{ROWS} th").all_text_contents()
    assert labels == sorted(labels, key=str.lower)


def test_the_filter_lists_arms_and_check_boxes_choose_what_is_drawn(page):
    before, drawn = picture(page), page.evaluate(LABEL)
    page.get_by_label("Filter arms").fill("dfa block")
    listed = page.evaluate(NAMES)
    assert "dfa block norm" in listed and "bp" not in listed
    assert page.locator(".explorer-listed").text_content() == f"{len(listed)} of {ARMS} arms listed"
    assert picture(page) == before  # what is listed and what is drawn are two things
    every = page.get_by_label("Draw all arms that are listed")
    assert every.evaluate("(box) => box.indeterminate")
    every.check()
    assert page.evaluate(LABEL) != drawn and picture(page) != before
    one = page.get_by_label("Draw DFA at every block, through a norm")
    one.focus()
    page.keyboard.press("Space")
    assert every.evaluate("(box) => box.indeterminate") and not one.is_checked()


@pytest.mark.parametrize("axis", ["Tokens", "FLOPs", "Seconds"])
def test_axis_and_loss_are_switched(page, axis):
    before = picture(page)
    page.get_by_label(axis, exact=True).check()
    switched = picture(page)
    page.get_by_label("Training loss").check()
    trained = picture(page)
    page.get_by_label("Logarithmic").check()
    assert len({before, switched, trained, picture(page)}) == 4
    assert "Training loss" in page.evaluate(LABEL)


def test_a_point_says_which_run_it_is_of_and_a_click_opens_its_arm(page):
    page.evaluate("document.querySelector('.explorer-figure').scrollIntoView({block: 'center'})")
    box = page.locator(".explorer .u-over").bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 5)
    for share in range(100):  # down a column until a line with a run is near
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + box["height"] * share / 100)
        text = page.locator(".explorer-tip").first.text_content()
        if page.locator(".explorer-tip").first.is_visible() and "digest" in text:
            break
    assert re.search(r"seed \d.*\d\.\d{3} nats at step \d+.*digest [0-9a-f]{16}", text), text
    page.mouse.down()
    page.mouse.up()
    assert page.locator(".explorer-title strong").text_content() in text
    assert page.locator("th button[aria-expanded=true]").count() == 1


def test_enter_on_an_arm_opens_its_alignment_and_again_closes_it(page):
    row = page.locator(f"{ROWS}[data-arm='fa'] th button")
    row.focus()
    page.keyboard.press("Enter")
    assert page.locator(".explorer-detail canvas").is_visible()
    cosines = picture(page, 1)
    figure = page.locator(".explorer-detail [role=img]")
    assert figure.get_attribute("aria-label").startswith("Cosine to the exact gradient")
    page.locator(".explorer-detail select").select_option("feedback")
    assert picture(page, 1) != cosines
    assert re.search(r"[0-9a-f]{16}", page.locator(".explorer-detail table").first.text_content())
    assert page.evaluate("document.activeElement.tagName") != "BODY"
    row.focus()
    page.keyboard.press("Enter")
    assert not page.locator(".explorer-detail").is_visible()


def test_the_other_suite_is_shown_when_it_is_chosen(page):
    page.locator(".explorer-form select").select_option("1")
    assert "bp softmax" in page.evaluate(NAMES)
    page.locator(f"{ROWS}[data-arm='bp softmax'] th button").click()
    assert "not measured" in page.locator(".explorer-title").text_content()


def test_the_theme_is_followed(page):
    before = picture(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.wait_for_timeout(100)
    assert picture(page) != before


def test_it_works_by_touch_on_a_narrow_screen(visit):
    page = visit(PAGE, width=390, has_touch=True, is_mobile=True)
    page.wait_for_selector(".explorer canvas")
    page.locator(f"{ROWS}[data-arm='fa'] th button").tap()
    assert page.locator(".explorer-detail canvas").is_visible()
    page.get_by_label("Seconds", exact=True).tap()
    assert "seconds" in page.evaluate(LABEL) or "time" in page.evaluate(LABEL)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_scripts_and_on_paper_the_figure_stands_in_its_place(visit):
    page = visit(PAGE, java_script_enabled=False)
    assert "in the built book, with scripts" in page.locator(".explorer").text_content().lower()
    assert page.locator("#rules-curves img.in-light").get_attribute("alt")
    page = visit(PAGE)
    page.emulate_media(media="print")
    assert (
        not page.locator(".explorer").is_visible() and page.locator("#rules-curves img.in-light").is_visible()
    )


def test_it_works_from_a_server(visit, served):
    page = visit(PAGE, home=served)
    page.wait_for_selector(".explorer canvas")
    assert page.locator(ROWS).count() == ARMS


def test_what_it_adds_to_its_page_is_small_and_no_other_page_loads_it(site):
    static = site / "_static"
    text = (site / PAGE).read_text(encoding="utf-8")
    loaded = set(re.findall(r'_static/((?:explorer|vendor/uplot)/[^"?]+)', text))
    parts = ("explorer/page.js", "explorer/data/book-rules-compared.js", "vendor/uplot/uPlot.iife.min.js")
    assert {*parts} <= loaded
    assert sum((static / file).stat().st_size for file in loaded) < MOST_BYTES
    others = [page for page in site.rglob("*.html") if page != site / PAGE]
    assert others and not any("_static/explorer/" in page.read_text(encoding="utf-8") for page in others)

"""The long tables of the pages, sorted by their heads."""

import pytest

pytestmark = pytest.mark.book

COLUMN = """(title) => {
    const heads = [...document.querySelectorAll("article th")];
    const head = heads.find((each) => each.textContent.trim() === title);
    const rows = [...head.closest("table").tBodies[0].rows];
    return [head.getAttribute("aria-sort"), rows.map((row) => row.cells[head.cellIndex].textContent.trim())];
}"""


def numbers(cells):
    """Return the cells that begin with a number, as numbers, and how many follow them that do not."""
    found = [
        float(cell.split()[0].replace("\u2212", "-")) for cell in cells if cell[0] in "+\u22120123456789"
    ]
    return found, len(cells) - len(found)


def test_a_head_sorts_its_table_by_mouse_and_keyboard(visit):
    page = visit("book/rules-compared.html")
    before = page.evaluate(COLUMN, "FLOPs")
    button = page.get_by_role("button", name="FLOPs", exact=True).first
    button.click()
    order, cells = page.evaluate(COLUMN, "FLOPs")
    assert order == "ascending" and cells != before[1] and sorted(cells) == sorted(before[1])
    assert numbers(cells)[0] == sorted(numbers(cells)[0])
    button.focus()
    page.keyboard.press("Enter")
    order, cells = page.evaluate(COLUMN, "FLOPs")
    assert order == "descending" and numbers(cells)[0] == sorted(numbers(cells)[0], reverse=True)
    page.get_by_role("button", name="rule", exact=True).first.click()
    order, cells = page.evaluate(COLUMN, "rule")
    assert order == "ascending" and cells == sorted(cells, key=str.lower)
    assert page.evaluate(COLUMN, "FLOPs")[0] is None


def test_claims_are_sorted_by_verdict_and_by_number(visit):
    page = visit("book/claims.html")
    page.get_by_role("button", name="verdict", exact=True).click()
    _, verdicts = page.evaluate(COLUMN, "verdict")
    assert verdicts == sorted(verdicts) and {"holds", "fails", "open"} <= {*verdicts}
    page.get_by_role("button", name="d", exact=True).click()
    page.get_by_role("button", name="d", exact=True).click()
    order, cells = page.evaluate(COLUMN, "d")
    found, _ = numbers(cells)
    assert order == "descending" and len(found) > 40 and min(found) < 0 < max(found)


def test_without_scripts_the_tables_stand_as_they_are(visit):
    page = visit("book/claims.html", java_script_enabled=False)
    assert page.locator("th > button").count() == 0 and page.locator("article th").count() > 5

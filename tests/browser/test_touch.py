"""What is moved in the chapters, on the built pages, opened from the disk as a reader opens them."""

import re

import pytest

pytestmark = pytest.mark.book

PAGES = {
    "runs": "book/chapters/02-measuring-a-learning-rule.html",
    "feedback": "book/chapters/03-feedback-alignment.html",
    "norm": "book/chapters/08-layernorms-backward.html",
    "codes": "book/chapters/11-frozen-codebook.html",
}
MOST_BYTES = 60_000
HANDLE = ".touch-handle"


def opened(visit, name: str, **window):
    page = visit(PAGES[name], **window)
    page.wait_for_selector(".touch")
    return page


def said(page) -> str:
    return page.locator(".touch-said").text_content()


def cells(page) -> list[list[str]]:
    """The numbers of the table, by row."""
    rows = page.locator(".touch-table tbody tr")
    return [rows.nth(i).locator("td").all_text_contents() for i in range(rows.count())]


def shown(number: float, digits: int = 2) -> str:
    return f"{number:.{digits}f}".replace("-", "−")


@pytest.mark.parametrize("name", PAGES)
def test_it_takes_the_place_of_its_figure_which_stands_on_paper(visit, name):
    page = opened(visit, name)
    figure = page.locator(f"figure.touch-{name}")
    assert not figure.locator("img.in-light").is_visible()
    assert figure.locator("figcaption").is_visible()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert not any(image.is_visible() for image in figure.locator("img").all())
    page.emulate_media(media="print")
    assert [image.is_visible() for image in figure.locator("img").all()] == [True, False]
    assert not figure.locator(".touch").is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_without_scripts_the_figure_stands(visit, name):
    image = visit(PAGES[name], java_script_enabled=False).locator(f"figure.touch-{name} img.in-light")
    assert image.is_visible() and len(image.get_attribute("alt")) > 60
    assert image.bounding_box()["height"] > 150


@pytest.mark.parametrize("name", PAGES)
def test_it_fits_a_phone_and_follows_the_theme(visit, name):
    page = opened(visit, name, width=390, has_touch=True, is_mobile=True)
    page.get_by_role("button").and_(page.locator(".touch .control-main")).tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator(f"figure.touch-{name} .touch").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    table = page.locator(".touch-numbers")
    assert table.count() == 0 or table.evaluate("(box) => box.scrollWidth <= box.clientWidth")

    def colour() -> str:
        return page.evaluate("getComputedStyle(document.querySelector('.touch-mark')).fill")

    light = colour()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert colour() != light


# ---------------------------------------------------------------------------------------------- feedback

COMPUTED = """([rule, scale, rate, steps]) => {
    const {start, step, measure} = touchMath.feedback;
    let state = start(1, scale);
    for (let i = 0; i < steps; i++) state = step(state, rule, rate);
    return measure(state, rule);
}"""


def test_a_network_learns_step_by_step_where_motion_is_not_wanted(visit):
    page = opened(visit, "feedback", reduced_motion="reduce")
    assert page.get_by_role("button", name="Start").count() == 0
    page.get_by_role("button", name="50 steps").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    measured = page.evaluate(COMPUTED, ["fa", 1, 0.1, 51])
    assert measured["weights"] < 60  # it began at a right angle
    assert f"Step 51: feedback alignment has loss {shown(measured['loss'], 3)}" in said(page)
    assert f"W₂ is {shown(measured['weights'], 0)}° from the feedback" in said(page)
    assert f"error {shown(measured['errors'], 0)}° from the exact one" in said(page)
    page.get_by_role("button", name="Reset").click()
    assert said(page).startswith("Step 0:")


def test_it_runs_by_itself_only_when_asked_and_pauses(visit):
    page = opened(visit, "feedback")
    page.wait_for_timeout(200)
    assert said(page).startswith("Step 0:")
    start = page.locator(".touch .control-main")
    start.click()
    page.wait_for_function("/Step [1-9]/.test(document.querySelector('.touch-said').textContent)")
    assert start.text_content() == "Pause"
    assert page.locator(".touch-said").get_attribute("aria-live") == "off"
    start.click()
    stands = said(page)
    page.wait_for_timeout(200)
    assert said(page) == stands
    assert page.locator(".touch-said").get_attribute("aria-live") == "polite"


def test_rule_scale_and_rate_are_chosen_by_keys(visit):
    page = opened(visit, "feedback", reduced_motion="reduce")
    page.get_by_label("Learning rule").select_option("kp")
    page.get_by_label("Size of the feedback").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_label("Learning rate").focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Step", exact=True).click()
    measured = page.evaluate(COMPUTED, ["kp", 2, 0.05, 1])
    assert f"Step 1: Kolen-Pollack has loss {shown(measured['loss'], 3)}" in said(page)
    page.get_by_label("Learning rule").select_option("bp")
    assert page.get_by_label("Size of the feedback").is_disabled()
    assert "the weight itself" in said(page)
    page.get_by_label("Learning rule").select_option("fa")
    for label in ("Size of the feedback", "Learning rate"):
        page.get_by_label(label).focus()
        page.keyboard.press("End")
    page.get_by_role("button", name="50 steps").click()
    assert "diverges" in said(page)


# ------------------------------------------------------------------------------------------ norm and codes

WALKED = {
    "norm": """([start, rate, steps]) => {
        const {BACKWARDS, step, loss, length, toPlane, fromPlane} = touchMath.norm;
        const a = fromPlane([0.93, 0.37].map((value) => value / Math.hypot(0.93, 0.37)));
        return Object.keys(BACKWARDS).map((kind) => {
            let x = fromPlane(start);
            for (let i = 0; i < steps; i++) x = step(kind, x, a, rate);
            return [length(x), loss(x, a)];
        });
    }""",
    "codes": """([start, rate, steps]) => {
        const {BACKWARDS, codebook, step, loss, length} = touchMath.codes;
        const [a, codes] = [[Math.cos(0.63), Math.sin(0.63)], codebook(8)];
        return Object.keys(BACKWARDS).map((kind) => {
            let h = start;
            for (let i = 0; i < steps; i++) h = step(kind, h, codes, a, rate);
            return [length(h), loss(h, codes, a)];
        });
    }""",
}
STARTS = {"norm": ([-0.7, 0.7], 0.2), "codes": ([-0.5, 0.7], 0.4)}


def position(page) -> list[float]:
    text = page.locator(HANDLE).get_attribute("aria-valuetext").replace("−", "-")
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.parametrize("name", WALKED)
def test_a_point_is_moved_by_keys_and_walks_as_computed(visit, name):
    page = opened(visit, name)
    (start, rate), handle = STARTS[name], page.locator(HANDLE)
    assert position(page) == start
    handle.focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    start = [start[0], start[1] - 0.4]
    assert position(page) == pytest.approx(start)
    page.get_by_role("button", name="Step", exact=True).focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="10 steps").click()
    found = page.evaluate(WALKED[name], [start, rate, 11])
    assert [[row[0], row[2]] for row in cells(page)] == [[shown(number) for number in row] for row in found]
    assert said(page).startswith("After 11 steps the length has gone")
    page.get_by_role("button", name="Back").click()
    assert len({row[0] for row in cells(page)}) == 1


@pytest.mark.parametrize("name", WALKED)
def test_a_point_is_dragged_and_stays_where_it_is_let_go(visit, name):
    page = opened(visit, name)
    page.get_by_role("button", name="10 steps").click()
    handle = page.locator(f"{HANDLE} .touch-point")
    handle.scroll_into_view_if_needed()
    page.evaluate("document.querySelector('.touch-plane').scrollIntoView({block: 'center'})")
    box, plane = handle.bounding_box(), page.locator(".touch-plane").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(plane["x"] + 0.7 * plane["width"], plane["y"] + 0.7 * plane["height"], steps=4)
    page.mouse.up()
    reach = float(page.locator(HANDLE).get_attribute("aria-valuemax"))
    assert position(page) == pytest.approx([0.4 * reach, -0.4 * reach], abs=0.03)
    moved = handle.bounding_box()
    assert moved["x"] + moved["width"] / 2 == pytest.approx(plane["x"] + 0.7 * plane["width"], abs=2)
    assert "length" in said(page) and "After" not in said(page)  # it is back at its start
    page.mouse.move(moved["x"] + moved["width"], moved["y"], steps=3)  # still on it
    assert position(page) == pytest.approx([0.4 * reach, -0.4 * reach], abs=0.03)
    assert page.locator(HANDLE).evaluate("(one) => getComputedStyle(one).touchAction") == "none"


def test_more_codes_are_nearer_and_cost_more_bits(visit):
    page = opened(visit, "codes")
    assert "one of 8: 3 bits" in said(page)
    page.get_by_label("Codes").select_option("16")
    assert "one of 16: 4 bits" in said(page)
    assert page.locator(".touch-code").count() == 16


# -------------------------------------------------------------------------------------------------- runs


def test_three_runs_are_scrubbed_and_their_losses_hidden_until_asked(visit):
    page = opened(visit, "runs")
    recorded = page.evaluate("touch.recorded")
    assert {row[3] for row in cells(page)} == {"?"}
    lines = page.locator(".touch-chart .touch-line").count()
    page.get_by_label("Training step").focus()
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    step = recorded["steps"][-7]
    for row, run in zip(cells(page), recorded["runs"], strict=True):
        assert row[0] == shown(dict(run["cosine"])[step]) and row[1] == shown(dict(run["stream"])[step], 1)
    assert f"Step {step}." in said(page) and "Which run" in said(page)
    page.locator(".touch-radios input").first.check()
    page.get_by_role("button", name="Show the losses").focus()
    page.keyboard.press("Enter")
    assert page.locator(".touch-chart .touch-line").count() == lines + 3
    ends = [run["loss"][-1][1] for run in recorded["runs"]]
    assert (
        f"You said A. C ({recorded['runs'][2]['label']}) ends at {shown(min(ends), 3)}, the lowest"
        in said(page)
    )
    last = [max(s for s, _ in run["loss"] if s <= step) for run in recorded["runs"]]
    losses = [dict(run["loss"])[s] for run, s in zip(recorded["runs"], last, strict=True)]
    assert [row[3] for row in cells(page)] == [shown(loss) for loss in losses]
    page.keyboard.press("Enter")  # the focus is still on the button
    assert {row[3] for row in cells(page)} == {"?"}


def test_it_is_light_and_no_other_page_loads_it(site):
    loaded = set()
    for page in PAGES.values():
        found = re.findall(r'_static/(touch/[^"?]+\.js)', (site / page).read_text(encoding="utf-8"))
        assert found[0] == "touch/touch.js"
        loaded |= {*found}
    assert sum((site / "_static" / file).stat().st_size for file in loaded) < MOST_BYTES
    others = {*site.rglob("*.html")} - {site / page for page in PAGES.values()}
    assert others and not any("_static/touch/" in page.read_text(encoding="utf-8") for page in others)

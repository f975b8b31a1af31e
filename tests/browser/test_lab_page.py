"""The built page "Train it here", opened from the disk as a reader opens it: run by `make check-browser`."""

import pytest
from bs4 import BeautifulSoup

pytestmark = pytest.mark.book

PAGE = "book/train-it-here.html"
STEP = "+document.getElementById('lab').dataset.step"
STOPPED = "document.getElementById('lab').dataset.running === 'false'"
BUTTON = "#lab .control-main"


def opened(visit, settings: str = "", **window):
    """Return the page, once the models are there."""
    page = visit(f"{PAGE}#{settings}", **window)
    page.wait_for_function(f"{STEP} >= 0")
    return page


def test_two_models_train_and_their_curves_are_drawn(visit):
    page = opened(visit, "a=bp,0.01,1&b=kp,0.01,1&start=1")
    before = float(page.locator("#lab tbody td").nth(4).text_content())
    page.wait_for_function(f"{STEP} >= 60")
    page.click(BUTTON)
    page.wait_for_function(STOPPED)
    after = [float(text) for text in page.locator("#lab tbody td").all_text_contents()[4:6]]
    assert before > 4 and max(after) < 3.5
    lines = page.evaluate(
        "[...document.querySelectorAll('#lab path.lab-line')].map((path) => path.getBBox().width)"
    )
    assert len(lines) == 6 and min(lines) > 10
    assert page.evaluate("document.querySelectorAll('#lab .lab-mark.lab-1').length") > 13, (
        "an angle for each layer"
    )
    samples = page.evaluate("[...document.querySelectorAll('#lab pre')].map((pre) => pre.textContent.length)")
    assert min(samples) > 100
    assert "Validation loss" in page.evaluate("document.querySelector('#lab [aria-live]').textContent")


def test_keys_start_pause_and_step(visit):
    page = opened(visit)
    page.focus(BUTTON)
    page.keyboard.press("Enter")
    page.wait_for_function(f"{STEP} > 0")
    assert page.text_content(BUTTON) == "Pause"
    page.keyboard.press("Enter")
    assert page.text_content(BUTTON) == "Start"
    page.wait_for_function(STOPPED)
    stands = page.evaluate(STEP)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{STEP} === {stands + 1}")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{STEP} === 0")


def test_settings_are_in_the_address_both_ways(visit):
    page = opened(visit, "a=dfa,0.001,3&b=unknown,7,1&width=64&blocks=9&seed=5")
    fields = page.locator("#lab select, #lab input").evaluate_all("(all) => all.map(({value}) => value)")
    # Rule, place of the rate and of the scale, twice; then width, place of the blocks, seed.
    assert fields == ["dfa", "2", "4", "fa", "3", "3", "64", "1", "5"]
    page.evaluate("""(() => {
        const field = document.querySelector("#lab select");
        field.value = "grape";
        field.dispatchEvent(new Event("change"));
    })()""")
    assert page.evaluate("location.hash") == "#a=grape,0.001,3&b=fa,0.003,1&width=64&blocks=2&seed=5"


BP = "Under backpropagation the feedback is the weight itself."
DFA = "Under direct feedback alignment only the head's feedback has the shape of its weight."


@pytest.mark.parametrize(
    ("rules", "said"), [(("fa", "kp"), ""), (("fa", "bp"), BP), (("dfa", "grape"), DFA)], ids=str
)
def test_what_is_said_of_the_angles_holds_before_they_are_measured_too(visit, rules, said):
    page = opened(visit)
    models = [{"rule": rule} for rule in rules]
    script = """(models) => {
        const results = new (lab.need("results").Results)();
        results.reset({models});
        results.draw();
        return results.note.textContent;
    }"""
    assert said == page.evaluate(script, models)


@pytest.mark.parametrize("window", [{"width": 390}, {"width": 1400, "color_scheme": "dark"}])
def test_nothing_is_wider_than_the_window(visit, window):
    page = opened(visit, "start=1", **window)
    page.wait_for_function(f"{STEP} > 10")
    assert page.evaluate("document.documentElement.scrollWidth") <= window["width"]
    assert page.evaluate("document.querySelector('#lab svg').getBoundingClientRect().width") > 240


def test_without_scripts_there_is_a_text_and_a_figure(site):
    html = BeautifulSoup((site / PAGE).read_text(encoding="utf-8"), "html.parser")
    lab = html.find(id="lab")
    assert "scripts" in lab.get_text() and (site / "book" / lab.img["src"]).exists()


def test_other_pages_do_not_load_the_lab(site):
    assert "_static/lab/page/" in (site / PAGE).read_text(encoding="utf-8")
    others = [page for page in site.rglob("*.html") if page != site / PAGE]
    assert (
        others and [page for page in others if "_static/lab/page/" in page.read_text(encoding="utf-8")] == []
    )

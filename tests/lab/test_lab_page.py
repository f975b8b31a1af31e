"""The built page "Train it here", opened from the disk as a reader opens it: run by `make check-site`."""

import json
import os
from pathlib import Path

import pytest
from browser import chromium, needs_chromium
from bs4 import BeautifulSoup
from node import ROOT

pytestmark = [pytest.mark.book, needs_chromium]

PAGE = "book/train-it-here.html"
STEP = "+document.getElementById('lab').dataset.step"
STOPPED = "document.getElementById('lab').dataset.running === 'false'"
BUTTON = "document.querySelector('#lab .lab-main')"


@pytest.fixture(scope="module")
def site() -> Path:
    named = os.environ.get("LOCALGPT_SITE")
    site = ROOT / (named or "_build/html")
    if not (site / PAGE).exists():
        (pytest.fail if named else pytest.skip)(f"there is no built book in {site}; run make html")
    return site


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def opened(browser, site, settings: str = "", **window):
    """Return ``browser`` at the page, once the models are there."""
    browser.open(f"{(site / PAGE).as_uri()}#{settings}", **window)
    browser.until(f"{STEP} >= 0")
    return browser


def test_two_models_train_and_their_curves_are_drawn(browser, site):
    page = opened(browser, site, "a=bp,0.01,1&b=kp,0.01,1&start=1")
    before = float(page.run("document.querySelectorAll('#lab tbody td')[4].textContent"))
    page.until(f"{STEP} >= 60")
    page.run(f"{BUTTON}.click()")
    page.until(STOPPED)
    after = [float(page.run(f"document.querySelectorAll('#lab tbody td')[{i}].textContent")) for i in (4, 5)]
    assert before > 4 and max(after) < 3.5
    lines = page.run(
        "[...document.querySelectorAll('#lab path.lab-line')].map((path) => path.getBBox().width)"
    )
    assert len(lines) == 6 and min(lines) > 10
    assert page.run("document.querySelectorAll('#lab .lab-mark.lab-1').length") > 13, (
        "an angle for each layer"
    )
    samples = page.run("[...document.querySelectorAll('#lab pre')].map((pre) => pre.textContent.length)")
    assert min(samples) > 100
    assert "Validation loss" in page.run("document.querySelector('#lab [aria-live]').textContent")
    assert page.complaints == []


def test_keys_start_pause_and_step(browser, site):
    page = opened(browser, site)
    page.run(f"{BUTTON}.focus()")
    page.key("Enter", 13)
    page.until(f"{STEP} > 0")
    assert page.run(f"{BUTTON}.textContent") == "Pause"
    page.key("Enter", 13)
    assert page.run(f"{BUTTON}.textContent") == "Start"
    page.until(STOPPED)
    stands = page.run(STEP)
    page.key("Tab", 9)
    page.key("Enter", 13)
    page.until(f"{STEP} === {stands + 1}")
    page.key("Tab", 9)
    page.key("Enter", 13)
    page.until(f"{STEP} === 0")


def test_settings_are_in_the_address_both_ways(browser, site):
    page = opened(browser, site, "a=dfa,0.001,3&b=unknown,7,1&width=64&blocks=9&seed=5")
    fields = page.run("[...document.querySelectorAll('#lab select, #lab input')].map((field) => field.value)")
    # Rule, place of the rate and of the scale, twice; then width, place of the blocks, seed.
    assert fields == ["dfa", "2", "4", "fa", "3", "3", "64", "1", "5"]
    page.run("""(() => {
        const field = document.querySelector("#lab select");
        field.value = "grape";
        field.dispatchEvent(new Event("change"));
    })()""")
    assert page.run("location.hash") == "#a=grape,0.001,3&b=fa,0.003,1&width=64&blocks=2&seed=5"
    assert page.complaints == []


BP = "Under backpropagation the feedback is the weight itself."
DFA = "Under direct feedback alignment only the head's feedback has the shape of its weight."


@pytest.mark.parametrize(
    ("rules", "said"), [(("fa", "kp"), ""), (("fa", "bp"), BP), (("dfa", "grape"), DFA)], ids=str
)
def test_what_is_said_of_the_angles_holds_before_they_are_measured_too(browser, site, rules, said):
    page = opened(browser, site)
    models = [{"rule": rule} for rule in rules]
    assert said == page.run(f"""(() => {{
        const results = new (lab.need("results").Results)();
        results.reset({{models: {json.dumps(models)}}});
        results.draw();
        return results.note.textContent;
    }})()""")


@pytest.mark.parametrize("window", [{"width": 390}, {"width": 1400, "prefers_color_scheme": "dark"}])
def test_nothing_is_wider_than_the_window(browser, site, window):
    page = opened(browser, site, "start=1", **window)
    page.until(f"{STEP} > 10")
    assert page.run("document.documentElement.scrollWidth") <= window["width"]
    assert page.run("document.querySelector('#lab svg').getBoundingClientRect().width") > 240


def test_without_scripts_there_is_a_text_and_a_figure(site):
    html = BeautifulSoup((site / PAGE).read_text(encoding="utf-8"), "html.parser")
    lab = html.find(id="lab")
    assert "scripts" in lab.get_text() and (site / "book" / lab.img["src"]).exists()


def test_other_pages_do_not_load_the_lab(site):
    assert "_static/lab/" in (site / PAGE).read_text(encoding="utf-8")
    others = [page for page in site.rglob("*.html") if page != site / PAGE]
    assert others and [page for page in others if "_static/lab/" in page.read_text(encoding="utf-8")] == []

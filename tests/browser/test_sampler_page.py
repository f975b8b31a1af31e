"""The recorded models that write in chapter 1, opened from the disk as a reader opens it."""

import pytest

pytestmark = pytest.mark.book

PAGE = "book/chapters/01-a-gpt-made-of-local-layers.html"
CARD = ".sampler-card"
WRITTEN = "[...document.querySelectorAll('.sampler-text')].map((pre) => pre.textContent.length)"
PROMPT = "KING RICHARD II:\n"


def test_a_model_is_loaded_when_it_is_asked_for_and_writes(visit):
    page = visit(PAGE)
    assert page.locator(CARD).count() == 6
    assert page.evaluate("document.querySelectorAll('script[src*=\"sampler/models/\"]').length") == 0
    card = page.locator(CARD).first
    card.locator("button").click()
    page.wait_for_function(f"({WRITTEN})[0] === {len(PROMPT)} + 400")
    first = card.locator("pre").text_content()
    assert first.startswith(PROMPT) and len(set(first)) > 20
    assert "backprop has written 400 characters" in page.locator(".sampler-said").text_content()
    assert page.evaluate("document.querySelectorAll('script[src*=\"sampler/models/\"]').length") == 1
    card.locator("button").click()
    page.wait_for_function("(t) => document.querySelector('.sampler-text').textContent !== t", arg=first)
    page.wait_for_function(f"({WRITTEN})[0] === {len(PROMPT)} + 400")


def test_all_models_continue_one_prompt_and_a_foreign_letter_is_refused_by_name(visit):
    page = visit(PAGE, width=390, color_scheme="dark")
    page.fill(".sampler-prompt", "Now ≠ then")
    page.click(".sampler .control-main")
    page.wait_for_function("document.querySelector('.sampler-said').textContent.endsWith('has no ≠')")
    assert page.evaluate(WRITTEN) == [0] * 6
    page.fill(".sampler-prompt", "Now is the winter of our discontent " * 3)
    page.click(".sampler .control-main")
    page.wait_for_function(f"({WRITTEN}).every((n) => n === {36 * 3} + 400)", timeout=60_000)
    texts = page.locator(".sampler-text").all_text_contents()
    assert len(set(texts)) == 6 and all(text.startswith("Now is the winter") for text in texts)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_only_the_page_that_asks_loads_it(site):
    pages = [page for page in site.rglob("*.html") if "_static/sampler/" in page.read_text(encoding="utf-8")]
    assert pages == [site / PAGE]
    assert "continue a text of yours" in (site / PAGE).read_text(encoding="utf-8")

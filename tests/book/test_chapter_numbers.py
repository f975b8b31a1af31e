"""The numbers of chapters, and of what is counted in them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book/_ext"))
import chapter_numbers  # noqa: E402  an extension of Sphinx, which is no package


@pytest.mark.parametrize(
    ("page", "number"),
    {
        "book/chapters/06-grape": 6,
        "chapters/15-cost-and-scale": 15,
        "book/claims": None,
        "book/06-x": None,
    }.items(),
)
def test_a_chapter_has_the_number_of_its_file(page, number):
    assert chapter_numbers.chapter_number(page) == number


def toc(*anchors):
    return nodes.bullet_list("", *(nodes.reference(anchorname=anchor) for anchor in anchors))


def test_chapters_are_numbered_and_neither_their_sections_nor_other_pages(monkeypatch):
    monkeypatch.setattr(
        chapter_numbers.TocTreeCollector, "assign_figure_numbers", lambda self, env: ["changed"]
    )
    pages = {"book/chapters/06-grape": toc("", "#idea"), "book/claims": toc("", "#more")}
    env = SimpleNamespace(tocs=pages, toc_secnumbers={}, titles={page: {} for page in pages})
    assert chapter_numbers.number_chapters(None, env) == ["changed"]
    assert env.toc_secnumbers == {"book/chapters/06-grape": {"": (6,), "#idea": ()}}
    assert env.titles == {"book/chapters/06-grape": {"secnumber": (6,)}, "book/claims": {}}
    assert pages["book/chapters/06-grape"][0]["secnumber"] == (6,)
    assert "secnumber" not in pages["book/claims"][0]

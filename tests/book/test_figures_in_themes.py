"""The drawings of the book in the colours of the light and of the dark theme."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
from docutils import nodes
from docutils.utils import new_document

from localgpt_core.report.style import SVG_METADATA, look, use_style

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book/_ext"))
import figures  # noqa: E402  an extension of Sphinx, which is no package


def drawn():
    """Return the SVG of a figure with lines, text on the ground, on a box and on a map."""
    use_style()
    figure, (ax, on_map) = plt.subplots(1, 2)
    for i in range(10):
        ax.plot([0, 1], [i, 1], **look(i))
    ax.set_title("title")
    ax.text(0.5, 1, "box", color="white", bbox={"facecolor": "#0173b2"})
    ax.plot([0.5], [0.5], "o", color="black")
    on_map.imshow([[0.0, 1.0]], cmap="cividis")
    on_map.text(0, 0, "0", color="white")
    on_map.text(1, 0, "1", color="black", rotation=90)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=SVG_METADATA)
    plt.close(figure)
    return file.getvalue()


@pytest.fixture(scope="module")
def svg():
    return drawn()


def fills_of_texts(svg):
    """Return for every text the fill of its glyphs, by what it says."""
    found = re.findall(
        r'<g id="text_\d+">(?:\s*<g id="patch_\d+">.*?</g>)?\s*<!-- (.*?) -->\s*<g (.*?)>', svg, flags=re.S
    )
    return {text: re.sub(r"transform=.*", "", attributes).strip() for text, attributes in found}


def test_a_figure_is_the_same_file_each_time_and_names_neither_date_nor_program(svg):
    assert drawn() == svg and "dc:date" not in svg and "Matplotlib" not in svg


def test_the_ground_of_a_figure_is_that_of_the_page(svg):
    for version in (figures.on_paper(svg), figures.in_the_dark(svg)):
        (ground,) = re.findall(r'<g id="patch_1">\s*<path d="[^"]*" style="(.*?)"', version)
        assert ground == "fill: none"
    light = figures.on_paper(svg)
    assert svg.replace("fill: #ffffff", "fill: none", 1) == light  # and nothing else


def test_greys_change_places():
    assert figures.on_dark((255, 255, 255)) == figures.PAPER and figures.on_dark((0, 0, 0)) == figures.INK
    shades = [figures.luminance(figures.on_dark((grey, grey, grey))) for grey in range(0, 256, 15)]
    assert shades == sorted(shades, reverse=True)


def test_luminance_by_hand():
    # WCAG 2: the channel 119 is ((119 / 255 + 0.055) / 1.055)^2.4 = 0.18447; white on it has 4.48 : 1.
    assert figures.luminance((119, 119, 119)) == pytest.approx(0.18447, abs=1e-5)
    assert figures.luminance((0, 255, 0)) == pytest.approx(0.7152)


@pytest.mark.parametrize("i", range(10))
def test_every_line_stands_out_in_the_dark_and_keeps_its_hue(i):
    before = tuple(round(255 * c) for c in look(i)["color"])
    after = figures.on_dark(before)
    contrast = (figures.luminance(after) + 0.05) / (figures.luminance(figures.PAPER) + 0.05)
    # The seventh of the palette is a grey.
    assert contrast >= (3.0 if max(before) - min(before) <= figures.GREY else 4.0)
    order = sorted(range(3), key=lambda channel: before[channel])
    assert sorted(range(3), key=lambda channel: after[channel]) == order


def test_a_pale_ground_becomes_a_dark_one():
    assert figures.luminance(figures.on_dark((253, 237, 236))) < 0.1


def test_text_on_a_colour_stays_and_text_on_the_ground_turns(svg):
    before, after = fills_of_texts(svg), fills_of_texts(figures.in_the_dark(svg))
    assert before["title"] == 'style="fill: #262626"' and before["box"] == 'style="fill: #ffffff"'
    turned = figures.hexadecimal(figures.on_dark((0x26,) * 3))
    assert after["title"] == f'style="fill: #{turned}"'
    assert after["box"] == 'fill="white"' and after.keys() == before.keys()
    texts = re.findall(
        r"<!-- (\d) -->\s*<g ([^>]*?) ?transform=\"translate\([^\"]*\"", figures.in_the_dark(svg)
    )
    assert ("0", 'fill="white"') in texts and ("1", 'fill="black"') in texts


def test_a_map_keeps_its_pixels_and_the_file_can_be_read(svg):
    after = figures.in_the_dark(svg)
    maps = [re.findall(r'xlink:href="data:image/png;base64,[^"]*"', text) for text in (svg, after)]
    assert maps[0] == maps[1] and len(maps[0]) == 1
    assert ElementTree.fromstring(after).get("fill") == f"#{figures.hexadecimal(figures.INK)}"
    assert "#262626" not in after


def test_two_images_stand_in_the_place_of_one(svg, tmp_path):
    (tmp_path / "page.svg").write_text(svg)
    (tmp_path / "_build/html").mkdir(parents=True)
    document = new_document("page")
    image = nodes.image(uri="page.svg", alt="what it says", classes=["own"])
    other = nodes.image(uri="photo.png", alt="a photo")
    document += nodes.figure("", image, nodes.caption("", "words"))
    document += other
    env = SimpleNamespace(relfn2path=lambda uri: (uri, str(tmp_path / uri)), srcdir=tmp_path)
    document.settings.env = env
    env.app = SimpleNamespace(outdir=tmp_path / "_build/html")
    figures.TwoThemes(document).apply()
    light, dark = document[0][:2]
    assert document[1] is other and isinstance(document[0][2], nodes.caption)
    for found, theme in ((light, "light"), (dark, "dark")):
        assert found["classes"] == ["own", f"in-{theme}"]
        assert found["alt"] == "what it says" and found["loading"] == "lazy"
        assert found["uri"].startswith("/_build/figures/")
    written = [(tmp_path / found["uri"][1:]).read_text() for found in (light, dark)]
    assert written == [figures.on_paper(svg), figures.in_the_dark(svg)]


def test_a_page_keeps_the_place_of_a_drawing_that_is_not_fetched_yet(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/a.svg").write_text('<svg width="475.2pt" height="273.6pt" viewBox="0 0 1 1"/>')
    image = '<img loading="lazy" class="own in-dark" src="../_images/a.svg" alt="x"/>'
    context = {"body": f'<p>{image}<img class="other" src="../_images/b.svg"/></p>'}
    figures.keep_their_place(SimpleNamespace(outdir=tmp_path / "html"), "page", "page.html", context, None)
    sized = image.replace("<img ", '<img width="634" height="365" ')  # 475.2 / 72 inches of 96 pixels
    assert context["body"] == f'<p>{sized}<img class="other" src="../_images/b.svg"/></p>'
    figures.keep_their_place(None, "search", "search.html", {}, None)

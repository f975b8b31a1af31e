"""Every drawing of the book in the colours of both themes: on the ground of the page, sharp at every size.

Figures are SVG, drawn on white. Here each becomes two: one without that white, and one in which besides
greys change places, from white to the ground of the dark theme, and colours too dark for it are lightened.
The page's style shows one of them. A picture inside a drawing, such as a map of numbers, keeps its colours,
and so does text in black or white, which stands on a colour (see `localgpt_core.report.style`).
"""

import re
from hashlib import sha256
from os.path import relpath
from pathlib import Path

from docutils import nodes
from sphinx.transforms import SphinxTransform

PAPER = (18, 18, 18)  # the ground of the dark theme
INK = (236, 238, 242)
CONTRAST = 4.0  # of a line or a symbol; WCAG 1.4.11 wants 3
GREY = 12  # the channels of a grey lie no farther apart
PALE = 0.7  # a colour of a larger luminance is a ground that something dark stands on

COLOUR = re.compile(r"(?<=: #)[0-9a-f]{6}(?=[;\"])")
WHITE_TEXT = re.compile(r'<g style="fill: #ffffff" (?=transform=)')
BLACK_TEXT = re.compile(r'<g (?=transform="translate\([^)]*\) (?:rotate\([^)]*\) )?scale\()')
GROUND = re.compile(r'(<g id="patch_1">\s*<path d="[^"]*" style="fill: )#ffffff')  # that of the whole figure
ROOT = re.compile(r"<svg(?= )")
SIZE = re.compile(r'<svg[^>]* width="([\d.]+)pt" height="([\d.]+)pt"')
SHOWN = re.compile(r'<img (?=[^>]*class="[^"]*\bin-(?:light|dark)\b)(?=[^>]*src="[^"]*?([^"/]+\.svg)")')
PIXELS = 96 / 72  # of a point

Colour = tuple[float, float, float]


def luminance(colour: Colour) -> float:
    """Return the relative luminance of WCAG 2, from 0 to 1."""
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def between(start: Colour, end: Colour, part: float) -> Colour:
    """Return the colour at ``part`` of the way."""
    return tuple(a + part * (b - a) for a, b in zip(start, end, strict=True))


def on_dark(colour: Colour) -> Colour:
    """Return ``colour``, meant for white, for the ground of the dark theme."""
    if max(colour) - min(colour) <= GREY:
        return between(INK, PAPER, sum(colour) / 3 / 255)
    if luminance(colour) > PALE and min(colour) > 150:
        return between(PAPER, colour, 0.25)
    least = CONTRAST * (luminance(PAPER) + 0.05) - 0.05
    lighter = (between(colour, (255, 255, 255), part / 20) for part in range(21))
    return next(found for found in lighter if luminance(found) >= least)


def hexadecimal(colour: Colour) -> str:
    """Return six hexadecimal digits."""
    return "".join(f"{round(c):02x}" for c in colour)


def on_paper(svg: str) -> str:
    """Return a figure of matplotlib's without its white ground."""
    return GROUND.sub(r"\1none", svg, count=1)


def in_the_dark(svg: str) -> str:
    """Return a figure of matplotlib's in the colours of the dark theme, without its ground."""

    def changed(found: re.Match) -> str:
        colour = tuple(int(found[0][i : i + 2], 16) for i in (0, 2, 4))
        return hexadecimal(on_dark(colour))

    text = WHITE_TEXT.sub('<g fill="white" ', on_paper(svg))
    text = COLOUR.sub(changed, BLACK_TEXT.sub('<g fill="black" ', text))
    # What else matplotlib draws in black has no colour of its own.
    return ROOT.sub(f'<svg fill="#{hexadecimal(INK)}"', text, count=1)


def drawings(app) -> Path:
    """Return the folder that they are written to."""
    return Path(app.outdir).parent / "figures"


def keep_their_place(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Write the size of every drawing into a page, so that nothing moves when it is fetched at last."""

    def sized(found: re.Match) -> str:
        size = SIZE.search((drawings(app) / found[1]).read_text(encoding="utf-8"))
        width, height = (round(float(points) * PIXELS) for points in size.groups())
        return f'{found[0]}width="{width}" height="{height}" '

    if "body" in context:
        context["body"] = SHOWN.sub(sized, context["body"])


class TwoThemes(SphinxTransform):
    """Put two images in the place of one that is SVG."""

    default_priority = 500

    def apply(self, **kwargs) -> None:
        """Write both beside what the notebooks' outputs are written to, and refer to them."""
        folder = drawings(self.app)
        for image in [*self.document.findall(nodes.image)]:
            if not image["uri"].endswith(".svg"):
                continue
            svg = Path(self.env.relfn2path(image["uri"])[1]).read_text(encoding="utf-8")
            folder.mkdir(parents=True, exist_ok=True)
            for theme, colours in (("light", on_paper), ("dark", in_the_dark)):
                text = colours(svg)
                path = folder / f"{sha256(text.encode()).hexdigest()[:20]}.svg"
                path.write_text(text, encoding="utf-8")
                shown = image.deepcopy()
                shown["uri"] = "/" + relpath(path, self.env.srcdir)
                shown["classes"].append(f"in-{theme}")
                shown["loading"] = "lazy"  # else both are fetched
                image.parent.insert(image.parent.index(image), shown)
            image.parent.remove(image)


def setup(app) -> dict[str, bool]:
    """Register both."""
    app.add_transform(TwoThemes)
    app.connect("html-page-context", keep_their_place)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

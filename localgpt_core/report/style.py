"""The look of every figure: one size, one palette, a marker and a dash for every line.

Colours are seaborn's colour-blind palette, and nothing depends on colour alone. In a notebook a figure is
SVG, sharp at every size, and the same file each time. Text is black or white where it stands on a colour, and
dark grey on the ground: so the book's pages know which to change in the dark.
"""

import sys
from textwrap import wrap

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localgpt_core.common.validation import printable

__all__ = [
    "HEIGHT",
    "SVG_METADATA",
    "WIDTH",
    "as_text",
    "draw_seeds",
    "legend",
    "look",
    "use_style",
    "visible",
]

WIDTH, HEIGHT = 6.6, 3.8  # inches, so narrow that a phone shows the text large enough
SVG_METADATA = {"Date": None, "Creator": None}  # neither belongs to what is drawn
INSIDE = 3  # lines that a legend inside the axes still leaves room for
LONG = 48  # characters of a label, of which two no longer stand beside each other
MARKERS = "osD^vPX*<>hd"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]


def use_style() -> None:
    """Set the book's style: one figure size, light grid, readable text, the colour-blind palette, SVG."""
    sns.set_theme(style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, HEIGHT),
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "svg.hashsalt": "localgpt",  # the same names in the file each time
            "image.interpolation": "none",  # a map keeps its own pixels, and has sharp edges
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.markersize": 5,
        }
    )
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata=SVG_METADATA)


def look(i: int) -> dict[str, object]:
    """Return colour, marker and dash of the i-th line of a figure."""
    palette = sns.color_palette("colorblind")
    return {
        "color": palette[i % len(palette)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
    }


def legend(figure: Figure, ax: Axes) -> None:
    """Add a legend for the lines of ``ax``: inside for up to three, below the axes for more.

    The figure grows by the space that the latter takes.
    """
    handles, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    if len(labels) <= INSIDE:
        ax.legend(handles, labels)
        return
    columns = 2 if max(map(len, labels)) <= LONG else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def as_text(text: str, width: int | None = None) -> str:
    """Return what matplotlib shows as ``text``: a label from a record or a suite, not the words of a page.

    A dollar is a dollar and begins no mathematics, and a line whose name begins with ``_`` is in the legend:
    a space stands before it. With ``width`` the text is broken into lines of that many characters.
    """
    shown = printable(text) if width is None else "\n".join(map(printable, wrap(text, width)))
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def visible(text: str) -> list[str]:
    """Return the characters of ``text`` with signs in place of line breaks and spaces."""
    return [{"\n": "⏎", " ": "·"}.get(character, character) for character in text]


def draw_seeds(ax: Axes, i: int, label: str, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw ``y`` against ``x`` as the i-th line: the mean over seeds, and every seed as a thin line.

    ``label`` is shown as it is (`as_text`).
    ``table`` has the columns ``seed``, ``x`` and ``y``; several values of a seed at one ``x`` are averaged.
    Without rows nothing is drawn.
    """
    if table.empty:
        return
    style = look(i)
    seeds = table.groupby(["seed", x])[y].mean().unstack("seed")
    for seed in seeds:
        ax.plot(seeds.index, seeds[seed], color=style["color"], linewidth=0.6, alpha=0.5)
    ax.plot(seeds.index, seeds.mean(axis=1), label=f"{as_text(label)} (n = {seeds.shape[1]})", **style)

"""The look of every figure: one size, one palette, a marker, a dash and a name for every line.

Colours are seaborn's colour-blind palette, and nothing depends on colour alone. In a notebook a figure is
SVG, sharp at every size, and the same file each time. Text is black or white where it stands on a colour, and
dark grey on the ground: so the book's pages know which to change in the dark.
"""

import sys
from collections.abc import Sequence
from textwrap import fill, wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from localgpt_core.common.validation import printable

__all__ = [
    "HEIGHT",
    "SVG_METADATA",
    "WIDTH",
    "as_text",
    "draw_seeds",
    "legend",
    "look",
    "name_points",
    "use_style",
    "visible",
]

WIDTH, HEIGHT = 6.6, 3.8  # inches, so narrow that a phone shows the text large enough
SVG_METADATA = {"Date": None, "Creator": None}  # neither belongs to what is drawn
MOST = 6  # lines that a legend names; more have their names beside them
INSIDE = 3  # lines that a legend inside the axes still leaves room for
LINE = 0.19  # inches, of a name in small letters
NARROW = 34  # characters of a name beside the axes, which is broken there
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


def legend(figure: Figure, ax: Axes) -> bool:
    """Say which line of ``ax``, the only axes of ``figure``, is which; return whether names stand beside it.

    Up to three lines have a legend inside the axes, up to six one below them, for which the figure grows;
    more have their names at their ends.
    """
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > MOST:
        lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
        ends = [line.get_xydata()[-1] for line in lines]
        name_points(ax, labels, ends, [line.get_color() for line in lines])
        return True
    if len(labels) <= INSIDE:
        if labels:
            ax.legend(handles, labels)
        return False
    columns = 2 if max(map(len, labels)) <= LONG else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")
    return False


def name_points(
    ax: Axes, names: Sequence[str], points: Sequence[Sequence[float]], colours: Sequence[object]
) -> None:
    """Write a name for each point right of ``ax``, as near to its height as the others let it, with a line.

    The limits of the axes are final: they are kept.
    """
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = to_axes.transform(np.asarray(points, dtype=float))[:, 1]
    order = np.argsort(heights, kind="stable")
    # The nearest heights, from bottom to top, that lie their lines apart: least squares under that.
    texts = [fill(name, NARROW) for name in names]
    lines = np.array([texts[place].count("\n") + 1 for place in order])
    line = LINE / (ax.get_position().height * ax.figure.get_figheight())
    apart = line * np.concatenate(([0], (lines[1:] + lines[:-1]).cumsum() / 2))
    placed = isotonic_regression(heights[order] - apart).x.clip(0, max(0, 1 - apart[-1])) + apart
    pointer = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for place, height in zip(order, placed, strict=True):
        ax.annotate(
            texts[place],
            points[place],
            (1.04, height),
            textcoords=ax.transAxes,
            va="center",
            fontsize="small",
            annotation_clip=False,
            arrowprops=pointer | {"color": colours[place]},
        )


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

"""The look of every figure: one size, one palette, a marker and a dash for every line.

Colours are seaborn's colour-blind palette, and nothing depends on colour alone.
"""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["HEIGHT", "WIDTH", "draw_seeds", "legend", "look", "use_style", "visible"]

WIDTH, HEIGHT = 7.2, 4.0  # inches; one size, because the text of a figure's repr holds it
INSIDE = 4  # lines that a legend inside the axes still leaves room for
MARKERS = "osD^vPX*<>hd"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]


def use_style() -> None:
    """Set the book's style: one figure size, light grid, readable text, the colour-blind palette."""
    sns.set_theme(style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, HEIGHT),
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.markersize": 5,
        }
    )


def look(i: int) -> dict[str, object]:
    """Return colour, marker and dash of the i-th line of a figure."""
    palette = sns.color_palette("colorblind")
    return {
        "color": palette[i % len(palette)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
    }


def legend(figure: Figure, ax: Axes) -> None:
    """Add a legend for the lines of ``ax``: inside for up to four, below the axes for more.

    The figure grows by the space that the latter takes.
    """
    handles, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    if len(labels) <= INSIDE:
        ax.legend(handles, labels)
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * ((len(labels) + 1) // 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")


def visible(text: str) -> list[str]:
    """Return the characters of ``text`` with signs in place of line breaks and spaces."""
    return [{"\n": "⏎", " ": "·"}.get(character, character) for character in text]


def draw_seeds(ax: Axes, i: int, label: str, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw ``y`` against ``x`` as the i-th line: the mean over seeds, and every seed as a thin line.

    ``table`` has the columns ``seed``, ``x`` and ``y``; several values of a seed at one ``x`` are averaged.
    Without rows nothing is drawn.
    """
    if table.empty:
        return
    style = look(i)
    seeds = table.groupby(["seed", x])[y].mean().unstack("seed")
    for seed in seeds:
        ax.plot(seeds.index, seeds[seed], color=style["color"], linewidth=0.6, alpha=0.5)
    ax.plot(seeds.index, seeds.mean(axis=1), label=f"{label} (n = {seeds.shape[1]})", **style)

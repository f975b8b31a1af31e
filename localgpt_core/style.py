"""The look of every figure: one size, one palette, a marker and a dash for every line.

Colours are seaborn's colour-blind palette, and nothing depends on colour alone.
"""

import matplotlib.pyplot as plt
import seaborn as sns

__all__ = ["HEIGHT", "WIDTH", "look", "use_style"]

WIDTH, HEIGHT = 7.2, 4.0  # inches; one size, because the text of a figure's repr holds it
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

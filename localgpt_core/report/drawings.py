"""Drawings of what the code does; they hold no results.

Solid blue is the signal on its way up, dashed orange the error on its way down. A filled box is a
`LocalLinear`, whose rule decides what goes down; an empty one keeps its exact derivative. Text is large
enough for a phone, where a drawing is shown at half its size.
"""

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from localgpt_core.common.validation import require
from localgpt_core.corpus.recall import KEYS, RECALL, RECALL_VOCABULARY
from localgpt_core.report.style import visible

__all__ = ["direct_paths", "feedback_paths", "model_drawing", "recall_drawing"]

SIZE = (7.2, 7.4)  # inches
SIGNAL, ERROR = sns.color_palette("colorblind")[:2]
INK, GREY = "0.15", "0.5"

Point = tuple[float, float]


def model_drawing() -> Figure:
    """Return a drawing of the model with one block opened, and of one LocalLinear."""
    figure, axes = plt.subplots(1, 2, figsize=SIZE, sharey=True)
    panels = (("the model", _draw_model), ("one LocalLinear", _draw_layer))
    for ax, (title, draw) in zip(axes, panels, strict=True):
        ax.set(xlim=(0, 4), ylim=(-0.4, 12.6))
        ax.set_title(title, fontsize=16)
        ax.axis("off")
        draw(ax)
    return figure


def _draw_model(ax: Axes) -> None:
    stream, branch = 1.0, 2.65
    ax.add_patch(plt.Rectangle((0.2, 1.25), 3.75, 8.75, facecolor="0.94"))
    _text(ax, 3.85, 9.65, "block, $L$ times", 13, ha="right")
    _arrow(ax, (stream, 0.9), (stream, 12.0), SIGNAL)
    _arrow(ax, (0.45, 12.0), (0.45, 1.0), ERROR)
    for bottom, names in (
        (1.6, ("norm", "q, k, v", "attention", "o")),
        (5.7, ("norm", "fc", "GELU", "proj")),
    ):
        top = bottom + 3.75
        ax.plot([stream, branch, branch], [bottom, bottom, top], color=SIGNAL, linewidth=2)
        _arrow(ax, (branch, top), (stream + 0.15, top), SIGNAL)
        circle = {"boxstyle": "circle,pad=0.05", "facecolor": "white", "edgecolor": SIGNAL, "linewidth": 2}
        _text(ax, stream, top, "+", 16, ha="center", bbox=circle)
        _arrow(ax, (3.65, top - 0.1), (3.65, bottom), ERROR)
        for i, name in enumerate(names):
            _box(ax, branch, bottom + 0.5 + 0.9 * i, name, is_local=i in (1, 3))
    _box(ax, stream, 0.65, "embeddings", is_local=False)
    _box(ax, stream, 10.5, "norm", is_local=False)
    _box(ax, stream, 11.4, "head", is_local=True)
    _text(ax, stream, 12.3, "loss", 15, ha="center")
    _text(ax, stream, -0.2, "characters", 15, ha="center")


def _draw_layer(ax: Axes) -> None:
    up, down = 1.0, 2.9
    ax.add_patch(plt.Rectangle((0.1, 5.5), 3.8, 4.6, facecolor="white", edgecolor=SIGNAL, linewidth=2))
    _arrow(ax, (up, 4.9), (up, 10.7), SIGNAL)
    _arrow(ax, (down, 10.7), (down, 4.9), ERROR)
    _box(ax, up, 8.7, "$W$", is_local=True)
    look = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": ERROR, "linewidth": 2}
    _text(ax, down, 8.7, "feedback", 15, ha="center", bbox=look)
    _text(
        ax,
        1.95,
        6.7,
        r"$\Delta W = \sum_t g_t^\top x_t$",
        16,
        ha="center",
        bbox={"facecolor": "white", "lw": 0},
    )
    _text(ax, 1.95, 5.8, "stays here", 13, ha="center", bbox={"facecolor": "white", "lw": 0})
    for x, y, name in (
        (up, 11.1, "$y$"),
        (down, 11.1, "$g$"),
        (up, 4.4, "$x$"),
        (down, 4.4, "error · feedback"),
    ):
        _text(ax, x, y, name, 16, ha="center")
    _box(ax, 0.4, 2.6, "  ", is_local=True)
    _text(ax, 0.9, 2.6, "LocalLinear: a rule\ndecides what goes down", 13)
    _box(ax, 0.4, 1.3, "  ", is_local=False)
    _text(ax, 0.9, 1.3, "exact derivative", 13)
    _arrow(ax, (0.1, 0.1), (0.75, 0.1), SIGNAL)
    _text(ax, 0.9, 0.1, "signal", 13)
    _arrow(ax, (2.75, 0.1), (2.1, 0.1), ERROR)
    _text(ax, 2.9, 0.1, "error", 13)


def _text(ax: Axes, x: float, y: float, text: str, size: int, **look: object) -> None:
    ax.text(x, y, text, va="center", fontsize=size, **{"color": INK, **look})


def _box(ax: Axes, x: float, y: float, text: str, is_local: bool) -> None:
    face, edge, ink = (SIGNAL, SIGNAL, "white") if is_local else ("white", GREY, INK)
    look = {"boxstyle": "round,pad=0.3", "facecolor": face, "edgecolor": edge, "linewidth": 2}
    _text(ax, x, y, text, 15, ha="center", color=ink, bbox=look)


def _arrow(ax: Axes, start: Point, end: Point, colour: object) -> None:
    look = {"arrowstyle": "-|>,head_length=.6,head_width=.3", "shrinkA": 0, "shrinkB": 0, "linewidth": 2}
    style = "--" if colour == ERROR else "-"
    ax.annotate("", end, start, arrowprops=look | {"color": colour, "linestyle": style})


def feedback_paths() -> Figure:
    """Return a drawing of two layers: the signal goes up, the error comes down, by each of two rules."""
    figure, axes = plt.subplots(1, 2, figsize=(5.6, 4.6))
    forward, backward = sns.color_palette("colorblind")[0], sns.color_palette("colorblind")[1]
    for ax, title, letter in zip(axes, ("backpropagation", "feedback alignment"), "WB", strict=True):
        for level in (0, 1):
            y = 1.5 + 3 * level
            for x, text, colour, sign in (
                (1, f"$W_{level + 1}^\\top$", forward, 1),
                (3, f"${letter}_{level + 1}$", backward, -1),
            ):
                box = {
                    "boxstyle": "round,pad=0.45",
                    "facecolor": "white",
                    "edgecolor": colour,
                    "linewidth": 2,
                }
                box["linestyle"] = "-" if sign > 0 else "--"
                arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
                ax.annotate("", (x, y + sign * 1.15), (x, y - sign * 1.15), arrowprops=arrow)
                ax.text(x, y, text, ha="center", va="center", fontsize=15, bbox=box)
            if letter == "W":
                ax.plot([1.6, 2.4], [y, y], ":", color="0.3", linewidth=2)
            note, height = ("copy", y + 0.25) if letter == "W" else ("fixed", y - 0.1)
            ax.text(2, height, note, ha="center", fontsize=12, color="0.3")
        for y, up, down in ((0, "$x$", ""), (3, "$h$", f"$e\\,{letter}_2$"), (6, "$y$", "$e$")):
            ax.text(1, y, up, ha="center", va="center", fontsize=15, color=forward)
            ax.text(3, y, down, ha="center", va="center", fontsize=15, color=backward)
        ax.text(1, -0.75, "signal", ha="center", fontsize=12, color=forward)
        ax.text(3, -0.75, "error", ha="center", fontsize=12, color=backward)
        ax.set(xlim=(0, 4), ylim=(-1, 6.5))
        ax.set_title(title, fontsize=14)
        ax.axis("off")
    return figure


def direct_paths() -> Figure:
    """Return a drawing of three blocks and a head: the error comes step by step, or straight to each."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 5.6))
    for ax, title in zip(axes, ("backpropagation", "direct feedback"), strict=True):
        direct = title == "direct feedback"
        _arrow(ax, (1, 0.1), (1, 8.6), SIGNAL)
        for level, name in enumerate(("block 1", "block 2", "block 3", "head")):
            y = 1.2 + 2 * level
            _box(ax, 1, y, name, is_local=True)
            if name == "head":
                continue
            if direct:
                _arrow(ax, (3.6, y + 1), (1.15, y + 1), ERROR)
                look = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": ERROR, "lw": 2}
                _text(ax, 2.6, y + 1, f"$B_{level + 1}$", 14, ha="center", bbox=look)
            else:
                _arrow(ax, (2.6, y + 2.9), (2.6, y + 1.1), ERROR)
                _text(ax, 2.8, y + 2, f"through block {level + 2}" if level < 2 else "through the head", 12)
        if direct:
            ax.plot([3.6, 3.6], [2.2, 8.9], "--", color=ERROR, linewidth=2)
        _text(ax, 1, 8.9, "logits", 14, ha="center")
        _text(ax, 3.6 if direct else 2.6, 9.2, "$e$", 16, ha="center")
        _text(ax, 1, -0.2, "$h_0$", 15, ha="center")
        ax.set(xlim=(0, 4.6), ylim=(-0.5, 9.6))
        ax.set_title(title, fontsize=15)
        ax.axis("off")
    return figure


def recall_drawing(sequence: str, hops: int) -> Figure:
    """Return a drawing of a ``sequence`` of ``recall-<hops>`` with the hops of its first query.

    Above the values of the table stand their keys. An arrow above is a hop, from a query or a value to the
    key that it names; the dashed one below takes the last value to the answer. Answers are filled.

    Raises:
        ValueError: For another sequence, such as one whose first answer takes another number of hops.
    """
    period, keys = RECALL.period, RECALL_VOCABULARY[1:]
    whole = len(sequence) == period and {*sequence} <= {*RECALL_VOCABULARY}
    require(whole, "sequence", sequence, f"must be {period} characters of {RECALL_VOCABULARY!r}")
    places = [1 + KEYS]
    for _ in range(hops):
        places.append(1 + keys.index(sequence[places[-1]]))
    query, *_, last = places
    reached = sequence[last] == sequence[query + 1]
    require(reached, "sequence", sequence, f"its first answer is not {hops} hops from its query")
    figure, ax = plt.subplots(figsize=(7.2, 4.2))
    for x, character in enumerate(visible(sequence)):
        face, edge = (ERROR if x in RECALL.answers else "white"), (SIGNAL if x in places else GREY)
        ax.add_patch(plt.Rectangle((x - 0.42, 0), 0.84, 1, facecolor=face, edgecolor=edge, linewidth=2))
        _text(ax, x, 0.5, character, 18, ha="center")
    for x, key in enumerate(keys, start=1):
        _text(ax, x, 1.35, key, 15, ha="center", color="0.35")
    for number, (start, end) in enumerate(zip(places, places[1:], strict=False), start=1):
        middle = _arc(ax, start, end, 1.7, 1.1 + 0.35 * abs(end - start), SIGNAL)
        look = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": SIGNAL, "linewidth": 2}
        _text(ax, *middle, str(number), 13, ha="center", bbox=look)
    _arc(ax, last, query + 1, -0.1, -1.4, ERROR)
    for x, title in (((1 + KEYS) / 2, "table"), ((KEYS + period) / 2, "queries and answers")):
        _text(ax, x, 6.0, title, 15, ha="center")
    ax.set(xlim=(-0.6, period - 0.4), ylim=(-1.8, 6.4))
    ax.axis("off")
    return figure


def _arc(ax: Axes, start: float, end: float, y: float, height: float, colour: object) -> Point:
    """Draw an arrow from (start, y) to (end, y) that rises by ``height``, and return its middle."""
    top = y + height / 0.75  # a cubic curve gets three quarters of the way to its two inner points
    curve = Path([(start, y), (start, top), (end, top), (end, y)], [1, 4, 4, 4])
    style = "--" if colour == ERROR else "-"
    ax.add_patch(
        FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=20, color=colour, lw=2, linestyle=style)
    )
    return (start + end) / 2, y + height

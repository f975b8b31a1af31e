"""The book's figures of what a rule did over training, from the diagnostics and accuracies of records."""

import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from localgpt_core.report.results import SuiteResults
from localgpt_core.report.style import WIDTH, as_text, draw_seeds, legend
from localgpt_core.report.tables import SOLVED

__all__ = ["accuracy_panels", "layer_maps", "over_training", "short_names"]

# The places of a block in the order of the forward pass.
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "feedback_attn", "mlp.fc", "mlp.proj")


def short_names(names: Sequence[str]) -> list[str]:
    """Return names of layers without what all of them share: ``blocks.0.attn.q_proj`` becomes ``0.q``."""
    drop = ("blocks.", "attn.", "mlp.", "_proj", ".weight")
    short = []
    for name in names:
        name = name.replace("mlp.proj", "mlp.out")
        for part in drop:
            name = name.replace(part, "")
        short.append(name)
    return short


def over_training(
    results: SuiteResults,
    arms: Sequence[str],
    quantity: str,
    ylabel: str,
    names: str | None = None,
    log: bool = False,
) -> Figure:
    """Return one quantity of the diagnostics against step: the mean over seeds, every seed as a thin line.

    Where the quantity has a value for each of several places, those whose name contains ``names`` (default:
    all) are averaged.
    """
    table = results.diagnostics(quantity)
    if names is not None:
        table = table[table["name"].str.contains(names)]
    figure, ax = plt.subplots()
    for i, arm in enumerate(arms):
        draw_seeds(ax, i, results.label(arm), table[table["arm"] == arm], "step", "value")
    if log:
        ax.set_yscale("log")
    else:
        ax.axhline(0, color="0.3", linewidth=0.9, zorder=0)
    ax.set(xlabel="training step", ylabel=ylabel)
    legend(figure, ax)
    return figure


def accuracy_panels(results: SuiteResults, panels: Mapping[str, Mapping[str, str]], chance: float) -> Figure:
    """Return accuracy against step, a panel per entry of ``panels``, two to a row: title -> label -> arm.

    The mean over seeds, every seed as a thin line. Dotted: ``chance``. Dashed: the share of the answers above
    which a run has solved its task. Panels share their axes, and the first one's lines are the legend.

    Raises:
        ValueError: If the suite has no such arm.
    """
    curves = results.curves()
    rows = (len(panels) + 1) // 2
    size = (WIDTH, 0.9 + 2.1 * rows)
    figure, axes = plt.subplots(rows, 2, sharex=True, sharey=True, squeeze=False, figsize=size)
    for ax, (title, arms) in zip(axes.flat, panels.items(), strict=False):
        for i, (label, arm) in enumerate(arms.items()):
            results.label(arm)
            draw_seeds(ax, i, label, curves[curves["arm"] == arm], "step", "val_accuracy")
        for level, dashes in ((chance, ":"), (SOLVED, "--")):
            ax.axhline(level, color="0.3", linewidth=0.9, linestyle=dashes, zorder=0)
        ax.set_title(as_text(title, 30))
        ax.set_ylim(0, 1.03)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    figure.supylabel("answers that are right", fontsize="medium")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def layer_maps(results: SuiteResults, arms: Sequence[str], quantity: str, colorbar: str) -> Figure:
    """Return one map per arm: rows are layers from the head down, columns steps, colour the mean over seeds.

    The colour runs from -1 to 1; what says nothing (NaN) stays grey.
    """
    table = results.diagnostics(quantity)
    maps = [_layers_by_step(table[table["arm"] == arm]) for arm in arms]
    rows = max((len(found) for found in maps), default=1)
    size = (WIDTH, 1.5 + 0.19 * rows)
    figure, axes = plt.subplots(1, len(arms), figsize=size, squeeze=False)
    image, named = None, []
    for ax, arm, found in zip(axes[0], arms, maps, strict=True):
        ax.set_facecolor("0.85")
        ax.grid(visible=False)
        ax.set_title(as_text(results.label(arm), 60 // len(arms)), fontsize="small")
        ax.set_xlabel("training step", fontsize="small")
        if found.empty:
            ax.set(xticks=[], yticks=[])
            continue
        image = ax.imshow(found, aspect="auto", cmap="PuOr", vmin=-1, vmax=1)
        ends = [0, len(found.columns) - 1]
        ax.set_xticks(ends, [found.columns[i] for i in ends], fontsize="x-small")
        # Rows are named once, where the next map has the same ones.
        names = [*map(as_text, short_names(list(found.index)))]
        ax.set_yticks(range(len(found)), [] if names == named else names, fontsize="x-small")
        named = names
    if image is not None:
        figure.colorbar(image, ax=axes, label=colorbar, shrink=0.7)
    return figure


def _layers_by_step(table: pd.DataFrame) -> pd.DataFrame:
    """Return layers x steps, the mean over seeds, in the order from the head down to the embeddings."""
    found = table.groupby(["name", "step"])["value"].mean().unstack("step")
    return found.reindex(sorted(found.index, key=_height, reverse=True))


def _height(name: str) -> tuple[int, int]:
    """Return where a place is: block (embeddings below, the head above all), and place in the block."""
    block = re.search(r"blocks\.(\d+)\.", name)
    if block is None:
        return (-1, -name.startswith("tok_emb")) if "emb" in name else (10**6, 0)
    return int(block[1]), next((i for i, part in enumerate(PLACES) if part in name), len(PLACES))

"""The book's figures of losses, and a few that show the inside of a model, in one style.

Losses are in nats per character, on the validation split or the part of it that a run's fields name.
"""

import sys
from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from localgpt_core.common.validation import require, require_choice
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.corpus.ngrams import floors
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.report.results import SuiteResults, load_results
from localgpt_core.report.style import HEIGHT, WIDTH, as_text, draw_seeds, legend, look, use_style, visible
from localgpt_core.report.tables import interval, require_seeds_once

__all__ = [
    "attention_maps",
    "attention_weights",
    "final_losses",
    "live_curves",
    "loss_curves",
    "loss_over",
    "run_curves",
    "singular_values",
    "start_and_end",
    "use_style",
]

LOSS = "validation loss (nats per character)"


def _floors(
    ax: Axes, floors: Mapping[str, float], horizontal: bool, named: bool = True, inside: bool = False
) -> None:
    """Draw the n-gram floors that fall inside the axes, each with its name if ``named``.

    The name stands behind the end of its line, or, ``inside`` the axes, on its start.
    """
    low, high = sorted(ax.get_ylim() if horizontal else ax.get_xlim())
    transform = ax.get_yaxis_transform() if horizontal else ax.get_xaxis_transform()
    last_in_row: list[float] = []
    for name, loss in sorted(floors.items(), key=lambda floor: floor[1]):
        if not low <= loss <= high:
            continue
        line, place = (ax.axhline, (1.0, loss)) if horizontal else (ax.axvline, (loss, 1.0))
        line(loss, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
        if not named:
            continue
        if inside:
            place = (0.0, loss)
        side = (
            {"ha": "left", "va": "bottom" if inside else "center"}
            if horizontal
            else {"ha": "center", "va": "bottom"}
        )
        # Beside each other, a name that would touch the one before it moves up to the first row with room.
        taken = [not horizontal and loss - last < 0.12 * (high - low) for last in last_in_row]
        row = [*taken, False].index(False)
        last_in_row[row : row + 1] = [loss]
        ax.text(*place, f" {name} " + "\n " * row, transform=transform, color="0.3", fontsize="small", **side)


AXES = {
    "step": "training step",
    "tflops": "matmul work of training ($10^{12}$ FLOPs)",
    "seconds": "time of the training steps (s)",
}


def loss_curves(
    results: SuiteResults,
    arms: Sequence[str],
    floors: Mapping[str, float],
    top: float | None = None,
    x: str | Sequence[str] = "step",
    step_seconds: Mapping[str, float] | None = None,
) -> Figure:
    """Return validation loss over training: the mean over seeds, every seed as a thin line, the floors.

    ``top`` cuts the loss axis, so that the start of training does not hide its end. ``x`` is ``"step"``,
    ``"tflops"`` or ``"seconds"``, or several of them, a panel each; the last needs the seconds of a training
    step of each arm.

    Raises:
        ValueError: For another ``x``, an arm that the suite does not have, or seconds without step times.
    """
    shown = [x] if isinstance(x, str) else list(x)
    for quantity in shown:
        require_choice("x", quantity, AXES)
    timed = "seconds" not in shown or bool({*arms} & {*(step_seconds or {})})
    require(timed, "step_seconds", step_seconds, f"has no seconds of a step of {', '.join(arms)}")
    curves = results.curves()
    curves["seconds"] = curves["step"] * curves["arm"].map(dict(step_seconds or {}))
    size = (WIDTH, HEIGHT if len(shown) == 1 else 1.25 * HEIGHT)
    figure, axes = plt.subplots(1, len(shown), sharey=True, squeeze=False, figsize=size)
    for ax, quantity in zip(axes[0], shown, strict=True):
        for i, arm in enumerate(arms):
            draw_seeds(ax, i, results.label(arm), curves[curves["arm"] == arm], quantity, "val_loss")
        ax.set_xlabel(AXES[quantity] if len(shown) == 1 else fill(AXES[quantity], 22))
        if top is not None:
            ax.set_ylim(top=top)
    if len(shown) == 1:
        inside = legend(figure, axes[0, 0])
    else:
        inside = False
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for ax in axes[0]:
        _floors(ax, floors, horizontal=True, named=ax is axes[0, -1], inside=inside)
    axes[0, 0].set_ylabel(LOSS)
    return figure


def final_losses(results: SuiteResults, arms: Sequence[str], floors: Mapping[str, float]) -> Figure:
    """Return the final loss of each arm: every seed a tick, the mean with its 95 % interval, the floors."""
    figure, ax = plt.subplots(figsize=(WIDTH, 1.4 + 0.42 * len(arms)))
    labels = []
    for i, arm in enumerate(arms):
        losses = [r.final_val_loss for r in results.of_arm(arm) if r.status == "finished"]
        failed = sum(r.status != "finished" for r in results.of_arm(arm))
        mean, half = interval(losses)
        style = look(i)
        ax.plot(losses, [i] * len(losses), "|", color=style["color"], markersize=11, alpha=0.8)
        ax.errorbar(mean, i, xerr=half if half == half else None, color=style["color"], capsize=3)
        ax.plot(mean, i, marker=style["marker"], color=style["color"], markersize=7)
        labels.append(as_text(results.label(arm), 24) + (f" ({failed} not finished)" if failed else ""))
    ax.set_yticks(range(len(arms)), labels)
    ax.invert_yaxis()
    ax.set(xlabel=LOSS)
    ax.grid(axis="y", visible=False)
    _floors(ax, floors, horizontal=False)
    return figure


def loss_over(
    table: pd.DataFrame, x: str, xlabel: str, floors: Mapping[str, float], log: bool = True
) -> Figure:
    """Return final loss against a numeric column, one line per ``label``, mean and 95 % interval over seeds.

    ``table`` has the columns ``x``, ``label`` and ``final_val_loss``; a run without a final loss is marked at
    the top.

    Raises:
        ValueError: If a point would be the mean of two runs of one seed, or of several arms, where the table
            has the columns ``seed`` and ``arm``.
    """
    for (label, value), group in table.groupby(["label", x], sort=False):
        point = f"{label}, {x}={value}"
        if "seed" in group:
            require_seeds_once(group, point, "label")
        arms = group["arm"].unique().tolist() if "arm" in group else []
        require(len(arms) <= 1, "label", point, f"is of the arms {', '.join(arms)}, which have no mean")
    figure, ax = plt.subplots()
    for i, (label, group) in enumerate(table.groupby("label", sort=False)):
        finished = group.dropna(subset="final_val_loss")
        points = finished.groupby(x)["final_val_loss"]
        means = points.mean()
        halves = [interval(values.tolist())[1] for _, values in points]
        ax.errorbar(
            means.index, means, yerr=np.nan_to_num(halves), capsize=3, label=as_text(label), **look(i)
        )
        lost = group[group["final_val_loss"].isna()]
        ax.plot(lost[x], [0.98] * len(lost), "x", color="black", transform=ax.get_xaxis_transform())
    if log:
        ax.set_xscale("log")
        ax.set_xticks(sorted(table[x].unique()), [f"{value:g}" for value in sorted(table[x].unique())])
        ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=LOSS)
    _floors(ax, floors, horizontal=True, inside=legend(figure, ax))
    return figure


@torch.no_grad()
def attention_weights(model: LocalGPT, idx: Tensor) -> Tensor:
    """Return the attention weights (L, H, T, T) that ``model`` gives to the ids (T,); rows are queries.

    Attention mixes the identity here instead of values, so that its output is the weights themselves. Dropout
    must be off: ``model.eval()``, or a model without it.
    """
    T = len(idx)
    x = model.tok_emb(idx) + model.pos_emb.weight[:T]
    found = []
    for block in model.blocks:
        attn, h = block.attn, block.ln1(x)
        q, k = (
            layer(h).view(T, model.config.n_head, -1).transpose(0, 1) for layer in (attn.q_proj, attn.k_proj)
        )
        found.append(attn.mix(q, k, torch.eye(T).to(h).expand(len(q), T, T)))
        x = block(x[None], [])[0]
    return torch.stack(found)


def attention_maps(weights: Mapping[str, Tensor], text: str) -> Figure:
    """Return attention weights (T x T, rows are queries), two maps to a row, with the characters as ticks."""
    rows = (len(weights) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(WIDTH, (WIDTH / 2 - 0.3) * rows), squeeze=False)
    characters = visible(text)
    size = "medium" if len(text) <= 16 else "x-small"
    for ax in axes.flat[len(weights) :]:
        ax.axis("off")
    for ax, (title, weight_TT) in zip(axes.flat, weights.items(), strict=False):
        image = ax.imshow(weight_TT.detach().cpu().numpy(), cmap="cividis", vmin=0.0)
        ax.set_xticks(range(len(text)), characters, fontsize=size)
        ax.set_yticks(range(len(text)), characters, fontsize=size)
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.set(title=title, xlabel="key", ylabel="query")
        figure.colorbar(image, ax=ax, shrink=0.75)
    return figure


def live_curves(curves: Mapping[str, Mapping[str, Sequence[float]]], floors: Mapping[str, float]) -> Figure:
    """Return validation loss against step for runs made in the page: label -> ``TrainResult.curves``.

    The untrained model is left out, so that the start does not hide the end.
    """
    figure, ax = plt.subplots()
    for i, (label, curve) in enumerate(curves.items()):
        ax.plot(curve["val_step"][1:], curve["val_loss"][1:], label=label, **look(i))
    ax.set(xlabel="training step", ylabel=LOSS)
    _floors(ax, floors, horizontal=True, inside=legend(figure, ax))
    return figure


def run_curves(curves: pd.DataFrame, floors: Mapping[str, float]) -> Figure:
    """Return validation loss against step of recorded runs: `localgpt_core.report.runs.curves_of`.

    The mean over seeds, every seed as a thin line, the floors; the untrained model is left out.
    """
    figure, ax = plt.subplots()
    for i, (label, own) in enumerate(curves[curves["step"] > 0].groupby("label", sort=False)):
        draw_seeds(ax, i, label, own, "step", "val_loss")
    ax.set(xlabel="training step", ylabel=LOSS)
    _floors(ax, floors, horizontal=True, inside=legend(figure, ax))
    return figure


def singular_values(matrices: Mapping[str, Tensor]) -> Figure:
    """Return the singular values of each matrix, largest first, on a logarithmic axis."""
    figure, ax = plt.subplots()
    for i, (label, matrix) in enumerate(matrices.items()):
        values = np.linalg.svd(matrix.detach().cpu().double().numpy(), compute_uv=False)
        ax.plot(range(1, len(values) + 1), values, label=label, markevery=16, **look(i))
    ax.set(xlabel="rank of the singular value", ylabel="singular value", yscale="log")
    ax.legend()
    return figure


def start_and_end(panels: Mapping[str, pd.DataFrame], title: str = "layer") -> Figure:
    """Return one panel per table: rows are layers, an arrow goes from column ``start`` to column ``end``."""
    rows = list(next(iter(panels.values())).index)
    size = (WIDTH, 1.2 + 0.3 * len(rows))
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=size, squeeze=False)
    for ax, (label, table) in zip(axes[0], panels.items(), strict=True):
        ax.axvline(0, color="0.3", linewidth=0.9)
        for i, (start, end) in enumerate(zip(table["start"], table["end"], strict=True)):
            ax.plot([start, end], [i, i], color="0.6", linewidth=1.5, zorder=1)
        for i, name in enumerate(("start", "end")):
            style = look(i) | {"linestyle": "none", "markersize": 7}
            ax.plot(table[name], range(len(rows)), label=name, **style)
        ax.set(xlabel=fill(label, 52 // len(panels)))
        ax.set_yticks(range(len(rows)), [*map(as_text, rows)])
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_ylabel(title)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _draw_for_readme(path: str) -> None:
    """Save the README's figure: what feedback alignment ends with, between backprop and a frozen body."""
    use_style()
    results = load_results("feedback-alignment")
    arms = ["bp", "frozen body", "fa gaussian", "fa orthogonal", "fa sparse", "fa ortho_he"]
    figure = final_losses(results, arms, floors(load_corpus(results.suite.corpus)))
    figure.savefig(path)


if __name__ == "__main__":
    _draw_for_readme(sys.argv[1])

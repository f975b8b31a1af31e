"""The book's figures of single mechanisms: places over training, codes and winners over a text, norms."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from localgpt_core.report.alignment_figures import short_names
from localgpt_core.report.results import SuiteResults
from localgpt_core.report.style import HEIGHT, WIDTH, as_text, look, visible

__all__ = ["code_map", "norm_fields", "places_over_training", "winner_masks"]

MOST_IN_A_ROW = 3  # panels


def places_over_training(results: SuiteResults, arms: Sequence[str], quantity: str, ylabel: str) -> Figure:
    """Return one panel per arm with one line per place: the mean over seeds of a quantity of the diagnostics.

    Panels share their axes, up to three in a row, more in two columns; the band spans the seeds.
    """
    table = results.diagnostics(quantity)
    columns = len(arms) if len(arms) <= MOST_IN_A_ROW else 2
    rows = -(-len(arms) // columns)
    size = (WIDTH, (HEIGHT if len(arms) > 1 else 0.9 * HEIGHT) * (0.3 + 0.7 * rows))
    figure, axes = plt.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, figsize=size)
    for ax in axes.flat[len(arms) :]:
        ax.axis("off")
    lines: dict[str, object] = {}
    for ax, arm in zip(axes.flat, arms, strict=False):
        found = table[table["arm"] == arm]
        for i, (name, group) in enumerate(found.groupby("name", sort=True)):
            by_step = group.groupby("step")["value"]
            mean, style = by_step.mean(), look(i)
            label = as_text(*short_names([name]))
            lines[label] = ax.plot(mean.index, mean, label=label, **style)[0]
            ax.fill_between(mean.index, by_step.min(), by_step.max(), color=style["color"], alpha=0.2, lw=0)
        ax.set_title(as_text(results.label(arm), 60 // columns), fontsize="small")
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    if lines:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(4, len(lines)))
    return figure


def code_map(codes: Mapping[str, Sequence[int]], text: str) -> Figure:
    """Return the code of each character of ``text``, one row per entry of ``codes``.

    Equal codes have equal colours, and the number of the code stands in its cell.
    """
    rows = list(codes)
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.55 * len(rows)))
    table = np.array([list(codes[row]) for row in rows])
    ranks = np.unique(table, return_inverse=True)[1].reshape(table.shape)
    ax.imshow(ranks, cmap="cividis", aspect="auto")
    middle = ranks.max() / 2
    for (y, x), code in np.ndenumerate(table):
        color = "white" if ranks[y, x] < middle else "black"
        ax.text(x, y, str(code), ha="center", va="center", fontsize="x-small", rotation=90, color=color)
    ax.set_xticks(range(len(text)), visible(text))
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.set_xlabel("character")
    return figure


def winner_masks(values: Mapping[str, Tensor], text: str) -> Figure:
    """Return which units are active for each character: one panel per entry, values (T x units).

    Dark is active. Rows are units in the order in which they first win, those that never win at the bottom.
    """
    figure, axes = plt.subplots(1, len(values), squeeze=False, figsize=(WIDTH, HEIGHT), sharey=True)
    for ax, (title, value) in zip(axes[0], values.items(), strict=True):
        active = (value.detach().cpu() != 0).numpy().T
        first = np.where(active.any(axis=1), active.argmax(axis=1), active.shape[1])
        ordered = active[np.argsort(first, kind="stable")]
        ax.imshow(ordered, cmap="Greys", aspect="auto", vmin=0, vmax=1)
        ax.set_xticks(range(len(text)), visible(text), fontsize="x-small")
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.set_title(fill(title, 60 // len(values)), fontsize="small")
        ax.set_xlabel("character")
    axes[0, 0].set_ylabel("unit, by first win")
    return figure


def norm_fields(norms: Mapping[str, nn.Module], target: Sequence[float] = (1.0, 0.4)) -> Figure:
    """Return what each norm's backward pass does in a plane: arrows point where a step of descent goes.

    The plane is that of the vectors of three entries that sum to zero, in which LayerNorm puts its output on
    a circle. Descent goes towards ``target``, a direction of the plane: the loss is -<y, target>.
    """
    basis = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    basis = (basis / basis.norm(dim=1, keepdim=True)).double()  # 2 x 3, orthonormal
    side = torch.linspace(-2, 2, 9, dtype=torch.double)
    points = torch.cartesian_prod(side, side)
    points = points[points.norm(dim=1) > 0.6]  # near the centre sigma is small and arrows cover it
    goal = torch.tensor(target, dtype=torch.double)
    figure, axes = plt.subplots(1, len(norms), squeeze=False, sharey=True, figsize=(WIDTH, 3.2))
    for ax, (title, norm) in zip(axes[0], norms.items(), strict=True):
        x = (points @ basis).requires_grad_(True)
        (gradient,) = torch.autograd.grad(-(norm.double()(x) @ basis.T @ goal).sum(), x)
        step = -(gradient @ basis.T)
        step = (step / step.norm(dim=1).max()).numpy()
        ax.add_patch(plt.Circle((0, 0), 3**0.5, fill=False, color="0.6", linestyle="--"))
        ax.quiver(*points.T.numpy(), *step.T, color=look(0)["color"], pivot="mid", scale=5.5, width=0.009)
        ax.plot(*(goal / goal.norm() * 3**0.5).tolist(), marker="*", markersize=12, color=look(1)["color"])
        ax.set(aspect="equal", xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        ax.set_title(fill(title, 60 // len(norms)), fontsize="small")
    return figure

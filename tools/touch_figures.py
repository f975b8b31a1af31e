"""Draw the figures that stand in the chapters on paper, and where no scripts run, in place of what is moved.

`python tools/touch_figures.py` writes `book/_static/touch/figures/`; the numbers are the package's.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core import LayerNormProjectedSurrogate, LayerNormSTE, VQResidualDir, localize
from localgpt_core.report.style import SVG_METADATA, WIDTH, look, use_style

BOOK = Path(__file__).parents[1] / "book"
FIGURES = BOOK / "_static/touch/figures"
sys.path.insert(0, str(BOOK / "_ext"))
import touch  # noqa: E402  an extension of Sphinx, which is no package


def lines(ax: Axes, title: str, curves: dict[str, tuple], **settings: object) -> None:
    """Draw curves, name: (xs, ys), with marks at a few points."""
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        ax.plot(xs, ys, label=name, markevery=max(1, len(ys) // 6), **look(i))
    ax.set(title=title, xlabel="training step", **settings)


def feedback() -> None:
    """Draw the loss of a linear network under two rules, and how its weight turns to the feedback."""
    curves, angles = {}, {"W₂ to B": [], "eB to eW₂": []}
    rules = {"feedback alignment": {"method": "fa", "feedback_std": 0.1}, "backpropagation": {"method": "bp"}}
    for name, rule in rules.items():
        torch.manual_seed(1)
        x, teacher = torch.randn(64, 20), torch.randn(8, 20) / math.sqrt(20)
        net = nn.Sequential(nn.Linear(20, 10, bias=False), nn.Linear(10, 8, bias=False))
        for layer in net:
            nn.init.normal_(layer.weight, std=0.1)
        localize(net, **rule)
        optimizer, curves[name] = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.02), []
        for _ in range(301):
            e = net(x) - x @ teacher.T
            loss = e.square().sum(dim=1).mean() / 2
            curves[name].append(loss.item())
            if name == "feedback alignment":
                weight, b = net[1].weight.detach(), net[1].feedback_weight
                for kind, pair in zip(
                    angles, [(weight, b), (e.detach() @ b, e.detach() @ weight)], strict=True
                ):
                    cosine = functional.cosine_similarity(*(part.flatten() for part in pair), dim=0)
                    angles[kind].append(math.degrees(math.acos(cosine)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.0))
    steps = range(301)
    lines(axes[0], "loss", {name: (steps, curve) for name, curve in curves.items()}, yscale="log")
    lines(
        axes[1], "angles in degrees", {name: (steps, curve) for name, curve in angles.items()}, ylim=(0, 120)
    )
    axes[1].axhline(90, color="0.4", linewidth=0.9, linestyle=":")
    axes[1].set_yticks(range(0, 121, 30))
    for ax in axes:
        ax.legend()


def walks(ax: Axes, start: Tensor, goal: Tensor, radius: float, trails: dict[str, list[Tensor]]) -> None:
    """Draw walks from ``start`` around a circle, on which the star lies in the direction ``goal``."""
    ax.add_patch(plt.Circle((0, 0), radius, fill=False, color="0.5", linestyle="--"))
    for i, (name, trail) in enumerate(trails.items()):
        wide = {"linewidth": 5, "alpha": 0.45} if i == 1 else {}  # two trails may lie on each other
        ax.plot(*torch.stack(trail).T, label=name, markevery=[-1], **look(i), **wide)
    ax.plot(*start, "o", color="white", markeredgecolor="black", markersize=9, zorder=5)
    ax.plot(*(radius * goal), "*", color="black", markersize=13)
    ax.set(aspect="equal")
    ax.set_axis_off()
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def norm() -> None:
    """Draw thirty steps of descent of an input of LayerNorm, by three backward passes."""
    basis = torch.tensor([[1.0, -1, 0], [1, 1, -2]])
    basis /= basis.norm(dim=1, keepdim=True)
    goal, start = functional.normalize(torch.tensor([0.93, 0.37]), dim=0), torch.tensor([-0.7, 0.7])
    norms = {
        "exact": LayerNormProjectedSurrogate(3),
        "no radial term": LayerNormProjectedSurrogate(3, "center_scale"),
        "identity": LayerNormSTE(3),
    }
    trails = {}
    for name, module in norms.items():
        trails[name] = [start]
        for _ in range(30):
            x = (trails[name][-1] @ basis).requires_grad_()
            (grad,) = torch.autograd.grad(-(module(x) @ basis.T @ goal), x)
            trails[name].append((x - 0.2 * grad).detach() @ basis.T)
    walks(plt.subplots(figsize=(WIDTH, 3.2))[1], start, goal, math.sqrt(3), trails)


def codes() -> None:
    """Draw thirty steps of descent of a token among eight codes, by three backward passes."""
    angles = 2 * math.pi * ((0.2 + torch.arange(8) * 0.6180339887) % 1)
    book = torch.stack((angles.cos(), angles.sin()), dim=1)
    goal, start = torch.tensor([math.cos(0.63), math.sin(0.63)]), torch.tensor([-0.5, 0.7])
    trails = {}
    for kind in ("identity", "tangent", "rotation"):
        vq = VQResidualDir(2, 8, backward=kind)
        vq.codebook.copy_(book)
        trails[kind] = [start]
        for _ in range(30):
            h = trails[kind][-1].clone().requires_grad_()
            (grad,) = torch.autograd.grad(-(functional.normalize(vq(h), dim=0) @ goal), h)
            trails[kind].append((h - 0.4 * grad).detach())
    ax = plt.subplots(figsize=(WIDTH, 3.2))[1]
    ax.plot(*book.T, "o", color="0.35", markersize=5)
    walks(ax, start, goal, 1, trails)


def runs() -> None:
    """Draw cosine, sizes and loss of the recorded runs."""
    found = touch.recorded(BOOK)["runs"]
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.4))
    titles = {
        "cosine": "cosine to the exact gradient",
        "stream": "size of the stream",
        "gradient": "size of the exact gradient",
        "loss": "validation loss (nats per character)",
    }
    for ax, (quantity, title) in zip(axes.flat, titles.items(), strict=True):
        curves = {}
        for name, run in zip("ABC", found, strict=True):
            curves[f"{name}: {run['label']}"] = tuple(zip(*run[quantity], strict=True))
        log = quantity in ("stream", "gradient")
        lines(ax, title, curves, yscale="log" if log else "linear")
    axes[1, 1].set_ylim(1.75, 3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def main(folder: Path = FIGURES) -> None:
    """Draw all, into ``folder``."""
    torch.set_num_threads(1)
    use_style()
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (feedback, norm, codes, runs):
        draw()
        plt.savefig(folder / f"{draw.__name__}.svg", metadata=SVG_METADATA)
        plt.close("all")


if __name__ == "__main__":
    main()

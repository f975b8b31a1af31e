"""How a run shows itself: a bar on a terminal, a plain line per evaluation elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from localgpt_core.cli.streams import Steady, say

if TYPE_CHECKING:
    from localgpt_core.training.settings import Report

__all__ = ["announced", "progress"]

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
# What a narrow terminal has no room for is cut off at the right: the title, not the losses.
NARROW, NARROW_BAR = 90, "{n_fmt}/{total_fmt} {desc}"


@contextmanager
def progress(steps: int, title: str, done: int = 0) -> Iterator[Report]:
    """Yield the ``report`` of a run of ``steps`` steps, ``done`` of them before it was resumed.

    Both kinds of output go to stderr. The first thing shown is that the run evaluates, or goes on.
    """
    stream = None if sys.stderr is None else Steady(sys.stderr)
    if stream is None or not stream.isatty():
        say(f"{title}: {'goes on from' if done else 'evaluating at'} step {done}/{steps}")
        yield _lines(steps, title)
        return
    from tqdm import tqdm

    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, file=stream) as bar:
        shown: dict[str, str] = {}

        def show(measured: dict[str, float]) -> None:
            shown.update({key[:-5]: f"{measured[key]:.3f}" for key in measured if key.endswith("_loss")})
            bar.n = int(measured["step"])
            draw(", ".join(f"{name}={loss}" for name, loss in shown.items()))

        def draw(news: str) -> None:
            narrow = (bar.format_dict["ncols"] or NARROW) < NARROW
            bar.bar_format = NARROW_BAR if narrow else BAR
            bar.set_description_str(f"{news} {title}" if narrow else f"{title}: {news}")

        draw("goes on" if done else "evaluating")
        yield show


@contextmanager
def announced(steps: int, title: str, done: int = 0) -> Iterator[None]:
    """Say that a run starts, and nothing more: one of several side by side."""
    say(f"{title}: {'goes on from' if done else 'starts at'} step {done}/{steps}")
    yield


def _lines(steps: int, title: str) -> Report:
    latest = {"train_loss": float("nan")}

    def show(measured: dict[str, float]) -> None:
        latest.update(measured)
        if "val_loss" in measured:
            train = (
                f"train {latest['train_loss']:.4f}, " if latest["train_loss"] == latest["train_loss"] else ""
            )
            step = int(measured["step"])
            say(f"{title}: step {step}/{steps}, {train}val {measured['val_loss']:.4f}")

    return show

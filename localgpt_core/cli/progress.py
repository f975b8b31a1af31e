"""How a run shows itself: a bar on a terminal, a plain line per evaluation elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from localgpt_core.cli.streams import Steady, say
from localgpt_core.training.settings import Report

__all__ = ["progress"]


@contextmanager
def progress(steps: int, title: str) -> Iterator[Report]:
    """Yield the ``report`` of a run of ``steps`` steps; both kinds of output go to stderr."""
    stream = None if sys.stderr is None else Steady(sys.stderr)
    if stream is None or not stream.isatty():
        yield _lines(steps, title)
        return
    with tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True, file=stream) as bar:
        shown: dict[str, str] = {}

        def show(measured: dict[str, float]) -> None:
            shown.update({key[:-5]: f"{measured[key]:.3f}" for key in measured if key.endswith("_loss")})
            bar.update(int(measured["step"]) - bar.n)
            bar.set_postfix(shown)

        yield show


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

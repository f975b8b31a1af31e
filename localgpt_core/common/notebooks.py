"""A progress bar below the cell of a notebook, for the person who runs it.

A notebook is also run by programs: to write its outputs, or to compare them. Those want what the cell
computes and nothing else. What tells them from a person in front of the page is what they promise the kernel:
a frontend for people answers `input`, nbconvert and nbval do not. So the bar is shown where input is allowed,
and is emptied when the run is over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

__all__ = ["watched"]


@contextmanager
def watched(steps: int, title: str) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield what reports a run of ``steps`` steps: a bar if a person runs this cell, else nothing."""
    if not _a_person_is_there():
        yield lambda measured: None
        return
    from IPython.display import display

    shown = {"step": 0.0}
    bar = display(_bar(shown, steps, title), raw=True, display_id=True)

    def report(measured: dict[str, float]) -> None:
        shown.update(measured)
        bar.update(_bar(shown, steps, title), raw=True)

    try:
        yield report
    finally:
        bar.update({"text/plain": "", "text/html": ""}, raw=True)


def _a_person_is_there() -> bool:
    """Return whether this code runs in a notebook whose frontend can ask somebody."""
    if "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def _bar(shown: dict[str, float], steps: int, title: str) -> dict[str, str]:
    """Return the bar in the two forms that a frontend may choose from."""
    losses = [f"{key[:-5]} {value:.3f}" for key, value in sorted(shown.items()) if key.endswith("_loss")]
    text = ", ".join([f"{title}: step {shown['step']:.0f}/{steps}", *losses])
    html = f'<progress value="{shown["step"]:.0f}" max="{steps}"></progress> {escape(text)}'
    return {"text/plain": text, "text/html": html}

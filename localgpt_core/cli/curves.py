"""Curves drawn in letters, for a terminal or a log."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

__all__ = ["drawn", "drawing_library", "floors_passed"]

WIDTH, HEIGHT = 80, 18  # characters, at most
FRAME = str.maketrans("─│┌┐└┘├┤┬┴┼", "-|+++++++++")


def drawing_library() -> ModuleType | None:
    """Return plotext, or None where it is not installed."""
    try:
        import plotext
    except ImportError:
        return None
    return plotext


def drawn(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> str:
    """Return a drawing of ``label -> (steps, losses)``, without colours and no wider than the terminal.

    One curve is drawn in points, several by a letter each. The loss of the untrained model is left out where
    there are three points or more. Without plotext, or a point to draw, the drawing is empty.
    """
    plot = drawing_library()
    if plot is None or not any(losses for _, losses in curves.values()):
        return ""
    plain = not _encodes("─")
    plot.clear_figure()
    plot.theme("clear")
    plot.plotsize(min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns), HEIGHT)
    single = "*" if plain else "braille"
    for i, (label, (steps, losses)) in enumerate(curves.items()):
        first = 1 if len(steps) > 2 and steps[0] == 0 else 0
        letter = chr(ord("a") + i % 26)
        marker, name = (single, label) if len(curves) == 1 else (letter, f"{letter} {label}")
        plot.plot(steps[first:], losses[first:], label=name, marker=marker)
    plot.xlabel("step")
    plot.ylabel(ylabel)
    lines = [line.rstrip() for line in plot.uncolorize(plot.build()).splitlines()]
    plot.clear_figure()
    text = "\n".join(line for line in lines if line)
    return text.translate(FRAME) if plain else text


def _encodes(letter: str) -> bool:
    """Return whether stdout can write ``letter``."""
    try:
        letter.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def floors_passed(loss: float, floors: Mapping[str, float]) -> str:
    """Return a sentence on which n-gram floors a validation loss is below."""
    below = [f"{name} {floor:.3f}" for name, floor in floors.items() if loss < floor]
    above = [f"{name} {floor:.3f}" for name, floor in floors.items() if loss >= floor]
    passed = f"below the n-gram floors {', '.join(below)}" if below else "below no n-gram floor"
    return f"{passed}; not below {', '.join(above)}" if above else passed

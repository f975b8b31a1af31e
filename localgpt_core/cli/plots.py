"""Curves drawn in letters, for a terminal or a log; the command that draws recorded ones, or a PNG."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from localgpt_core.cli.options import (
    BOOK_RECORDS,
    OtherCorpus,
    OtherPreset,
    Overwrite,
    Records,
    require_absent,
)
from localgpt_core.cli.streams import say, starting, tell
from localgpt_core.common.files import require_writable
from localgpt_core.common.validation import printable, require

__all__ = ["commands", "drawn", "floors_passed"]

commands = typer.Typer()

WIDTH, HEIGHT = 80, 18  # characters, at most
FRAME = str.maketrans("─│┌┐└┘├┤┬┴┼", "-|+++++++++")


@commands.command()
def plot(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="TOML file of a suite, file of a record, or its digest or the beginning of it; repeatable",
            show_default="all records",
        ),
    ] = None,
    records: Records = BOOK_RECORDS,
    preset: OtherPreset = None,
    corpus: OtherCorpus = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="kind of device whose runs are drawn, cpu or cuda",
            show_default="that of the suite's preset, or of the first record",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file to draw", show_default="in letters, on stdout")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw validation loss over training, the mean over seeds.

    The runs of a drawing are of one kind of device; how many were made on another is said.

    A PNG shows every seed as well, and the n-gram floors of a text that is at hand and small.
    """
    if out is None:
        allowed = 'drawing in letters needs plotext: pip install "localgpt[figures]", or --out FILE.png'
        require(drawing_library() is not None, "out", out, allowed)
    else:
        require(out.suffix == ".png", "out", str(out), "must end in .png")
        require_writable("out", out)
        require_absent("out", out, overwrite)
    with starting():
        from localgpt_core.records import load_records
        from localgpt_core.report.runs import asked_for, cheap_floors, curves_of
        from localgpt_core.report.tables import not_shown
    found = load_records(records, say)
    shown, kind, elsewhere = asked_for(what or [*found], found, preset, corpus, device)
    if elsewhere:
        say(f"{not_shown(elsewhere, kind)}; --device {'cpu' if kind == 'cuda' else 'cuda'} draws them")
    require(len(shown) > 0, "records", str(records), "has no such record")
    curves = curves_of(shown)
    if out is None:
        means = curves.groupby(["label", "step"], sort=False)["val_loss"].mean()
        pairs = {label: means[label] for label in dict.fromkeys(curves["label"])}
        print(drawn({printable(label): ([*own.index], [*own]) for label, own in pairs.items()}, "nats"))
        return
    with starting():
        from localgpt_core.report.losses import run_curves, use_style
    by_text = cheap_floors({record.digest: record for _, record in shown})
    use_style()
    run_curves(curves, next(iter(by_text.values()))[1] if len(by_text) == 1 else {}).savefig(out)
    tell(f"{len(shown)} runs: {out}")


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

"""The command that draws recorded curves: in letters, or as a PNG."""

from pathlib import Path
from typing import Annotated

import typer

from localgpt_core.cli.curves import drawing_library, drawn
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
from localgpt_core.common.validation import require

__all__ = ["commands"]

commands = typer.Typer()


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
    out: Annotated[
        Path | None, typer.Option(help="PNG file to draw", show_default="in letters, on stdout")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw validation loss over training, the mean over seeds.

    A PNG shows every seed as well, and the n-gram floors of a text that is at hand and small.
    """
    if out is None:
        allowed = "drawing in letters needs plotext: pip install plotext==5.3.2, or --out FILE.png"
        require(drawing_library() is not None, "out", out, allowed)
    else:
        require(out.suffix == ".png", "out", str(out), "must end in .png")
        require_writable("out", out)
        require_absent("out", out, overwrite)
    with starting():
        from localgpt_core.experiments.records import load_records
        from localgpt_core.report.runs import asked_for, cheap_floors, curves_of
    found = load_records(records, say)
    shown = asked_for(what or [*found], found, preset, corpus)
    require(len(shown) > 0, "records", str(records), "has no such record")
    curves = curves_of(shown)
    if out is None:
        means = curves.groupby(["label", "step"], sort=False)["val_loss"].mean()
        pairs = {label: means[label] for label in dict.fromkeys(curves["label"])}
        print(drawn({label: ([*own.index], [*own]) for label, own in pairs.items()}, "nats"))
        return
    with starting():
        from localgpt_core.report.losses import run_curves, use_style
    by_text = cheap_floors({record.digest: record for _, record in shown})
    use_style()
    run_curves(curves, next(iter(by_text.values()))[1] if len(by_text) == 1 else {}).savefig(out)
    tell(f"{len(shown)} runs: {out}")

"""Options that commands share, and one option for every field of the two configurations."""

from __future__ import annotations

import codecs
import inspect
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from localgpt_core.cli.streams import say, starting
from localgpt_core.common.validation import require
from localgpt_core.config import PRESETS, LocalGPTConfig, TrainConfig
from localgpt_core.rules import RULES, RuleOptions

if TYPE_CHECKING:
    from localgpt_core.corpus.corpus import Corpus
    from localgpt_core.tracking import Tracker

__all__ = [
    "BOOK_RECORDS",
    "CORPUS_HELP",
    "Accumulate",
    "Address",
    "CorpusName",
    "Device",
    "DryRun",
    "Engine",
    "GpuShare",
    "NewRecords",
    "OtherCorpus",
    "OtherPreset",
    "Overwrite",
    "Preset",
    "ProfileInstead",
    "Records",
    "Retries",
    "RowsFile",
    "Sbatch",
    "Threads",
    "TraceFolder",
    "Track",
    "require_absent",
    "say",
    "text_of",
    "tracker_named",
    "with_config_options",
]

PRESET_HELP = "sizes and schedule: " + ", ".join(PRESETS)
CORPUS_HELP = "shakespeare, tinyshakespeare, complete, recall-1, recall-2, recall-3 or a text file"

Preset = Annotated[str, typer.Option(help=PRESET_HELP)]
OtherPreset = Annotated[
    str | None, typer.Option("--preset", help=PRESET_HELP, show_default="the suite's own")
]
CorpusName = Annotated[str, typer.Option("--corpus", help=CORPUS_HELP)]
OtherCorpus = Annotated[
    str | None, typer.Option("--corpus", help=CORPUS_HELP, show_default="that of the suite or record")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Threads = Annotated[int, typer.Option(help="number of CPU threads of each run")]
Accumulate = Annotated[
    int, typer.Option(help="parts that a process takes its share of a batch in; the run is the same")
]
Records = Annotated[Path, typer.Option(help="folder with all records")]
BOOK_RECORDS = Path("book/records")
NewRecords = Annotated[
    Path | None, typer.Option("--out", help="folder for new records", show_default="RECORDS/SUITE")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is already there")]
RowsFile = Annotated[
    Path | None, typer.Option(help="JSON file to write the rows to as well", show_default="none")
]
PROFILE_HELP = (
    "show instead where the time of a step goes, without compilation: in the suite's arms, or in a few rules "
    "and a GPT of torch's own layers"
)
ProfileInstead = Annotated[bool, typer.Option("--profile", help=PROFILE_HELP)]
TRACE_HELP = (
    "with --profile: folder to write a trace of one step of each to as well, which opens in Perfetto "
    "(ui.perfetto.dev)"
)
TraceFolder = Annotated[Path | None, typer.Option(help=TRACE_HELP, show_default="none")]
TRACK_HELP = (
    "who else is told of each run: tensorboard[:FOLDER], by default with the folder runs/tensorboard; or "
    "a module that is called as Weights & Biases is, MODULE[:PROJECT], such as wandb or trackio"
)
Track = Annotated[str | None, typer.Option("--track", help=TRACK_HELP, show_default="nobody")]

ON_A_CLUSTER = "On a cluster"
ENGINE_HELP = (
    "who makes the runs: local, this machine; ray, the tasks of a Ray cluster, which begin again where a "
    "machine is gone; slurm, an array of jobs"
)
Engine = Annotated[str, typer.Option(help=ENGINE_HELP, rich_help_panel=ON_A_CLUSTER)]
Address = Annotated[
    str | None,
    typer.Option(
        help="ray: a cluster that is there, HOST:PORT or auto",
        show_default="one on this machine, which ends with the command",
        rich_help_panel=ON_A_CLUSTER,
    ),
]
GpuShare = Annotated[
    float | None,
    typer.Option(
        help="ray: share of a GPU that a run takes on cuda", show_default="1", rich_help_panel=ON_A_CLUSTER
    ),
]
Retries = Annotated[
    int | None,
    typer.Option(
        help="ray: how often a run is begun again whose process or machine is gone",
        show_default="10",
        rich_help_panel=ON_A_CLUSTER,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="slurm: print the script instead of handing it to sbatch",
        rich_help_panel=ON_A_CLUSTER,
    ),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        help="slurm: an option of sbatch, such as --sbatch=--partition=gpu; repeatable",
        show_default="none",
        rich_help_panel=ON_A_CLUSTER,
    ),
]


def text_of(name: str, corpus: Corpus) -> Corpus:
    """Return ``corpus``, saying what a user's file has that people do not see."""
    from localgpt_core.corpus.corpus import SHA256

    if name not in SHA256:
        with suppress(OSError), open(name, "rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                say(f"corpus {corpus.name!r}: the byte order mark at its start is left out")
    if "\r\n" in corpus.text:
        say(f"corpus {corpus.name!r}: its lines end in \\r\\n, and \\r is one of its symbols")
    return corpus


def tracker_named(words: str | None) -> Tracker | None:
    """Return the tracker that ``--track`` names, whose package is imported; None for None."""
    if words is None:
        return None
    with starting():
        from localgpt_core.tracking import tracker_of

        return tracker_of(words)


def require_absent(field: str, path: Path, overwrite: bool) -> None:
    """Raise ``ValueError`` where ``path`` is a file already, unless it may be overwritten."""
    require(overwrite or not path.exists(), field, str(path), "is there already; --overwrite replaces it")


def _panel(item: Field) -> str:
    """Return the group of options in whose frame the help shows a field of a configuration."""
    if item.name in {field.name for field in fields(TrainConfig)}:
        return "Training"
    of_rule = item.name in {field.name for field in fields(RuleOptions)} or item.name.startswith("dfa_")
    return "Rule" if of_rule else "Model"


def _help(item: Field) -> str:
    if item.name == "lr":
        return f"{item.metadata['help']}; auto = the best one recorded for the rule, else the preset's"
    if item.name != "method":
        return item.metadata["help"]
    return "\n\n".join([item.metadata["help"], *(f"{name}: {RULES.summary(name)}" for name in RULES)])


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return {None: "none", "": "empty"}.get(value, str(value))


def _default(item: Field) -> str:
    """Return the default of a field as the help shows it, for each preset where they differ."""
    if item.name == "vocab_size":
        return "the corpus's"
    if item.name == "lr":
        return "auto, or that of --config"
    given = {name: (model | train).get(item.name, item.default) for name, (model, train) in PRESETS.items()}
    if len({*given.values()}) == 1:
        return _shown(given.popitem()[1])
    return ", ".join(f"{name} {_shown(value)}" for name, value in given.items())


def _option_of(item: Field) -> inspect.Parameter:
    """Return the command-line option of a configuration field; its default is the preset's."""
    kind = {"feedback_seed": int, "lr": str}.get(item.name, type(item.default))
    option = typer.Option(
        help=_help(item),
        show_default=_default(item),
        rich_help_panel=_panel(item),
        metavar="FLOAT|auto" if item.name == "lr" else None,
    )
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(..., overrides)`` one option per field of the two configurations.

    The help shows its own options under Run.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "overrides"]
    own = [_in_panel(parameter) for parameter in own]
    options = [_option_of(item) for cls in (LocalGPTConfig, TrainConfig) for item in fields(cls)]

    def wrapped(**arguments: Any) -> None:
        given = {option.name: arguments.pop(option.name) for option in options}
        overrides = {name: value for name, value in given.items() if value is not None}
        command(**arguments, overrides=overrides)

    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    wrapped.__signature__ = signature.replace(parameters=[*own, *options])
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _in_panel(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, option = get_args(parameter.annotation)
    option = copy(option)
    option.rich_help_panel = "Run"
    return parameter.replace(annotation=Annotated[kind, option])

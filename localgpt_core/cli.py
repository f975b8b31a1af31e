"""The command line: train, run, table, sample, verify, bench, corpus, export, import.

An error of the user's is one line on stderr, naming the value and what is allowed, and exit status 2.
"""

import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from localgpt_core.checkpoints import load_checkpoint
from localgpt_core.config import PRESETS, LocalGPTConfig, TrainConfig
from localgpt_core.corpus import Corpus, line_agreement, load_corpus
from localgpt_core.model import LocalGPT
from localgpt_core.progress import progress
from localgpt_core.records import (
    RunRecord,
    export_bundle,
    import_bundle,
    load_records,
    resolve_spec,
)
from localgpt_core.runs import execute, sample_text
from localgpt_core.scheduler import SuiteRun
from localgpt_core.suites import read_suite
from localgpt_core.training import select_device
from localgpt_core.validation import require, require_integer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and measure a character GPT whose linear layers choose how they learn.",
)

RECORDS = Path("book/records")

Preset = Annotated[str, typer.Option(help=" or ".join(PRESETS))]
CorpusName = Annotated[
    str, typer.Option("--corpus", help="shakespeare, tinyshakespeare, complete or a text file")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Threads = Annotated[int, typer.Option(help="CPU threads")]
Records = Annotated[Path, typer.Option(help="folder with all records")]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _set_threads(threads: int) -> None:
    require_integer("threads", threads, 1)
    torch.set_num_threads(threads)


def _option_of(item: Field) -> inspect.Parameter:
    """Return the command-line option of a configuration field; its default is the preset's."""
    kind = int if item.name == "feedback_seed" else type(item.default)
    annotation = Annotated[kind | None, typer.Option(help=item.metadata["help"], show_default=False)]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(..., overrides)`` one option per field of the two configurations."""
    signature = inspect.signature(command)
    own = [parameter for name, parameter in signature.parameters.items() if name != "overrides"]
    options = [_option_of(item) for cls in (LocalGPTConfig, TrainConfig) for item in fields(cls)]

    def wrapped(**arguments: Any) -> None:
        given = {option.name: arguments.pop(option.name) for option in options}
        overrides = {name: value for name, value in given.items() if value is not None}
        command(**arguments, overrides=overrides)

    wrapped.__signature__ = signature.replace(parameters=[*own, *options])
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


@app.command()
@_with_config_options
def train(
    *,
    preset: Preset = "cpu",
    corpus: CorpusName = "shakespeare",
    device: Device = "cpu",
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="folder for the record and the checkpoint")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="go on from this run's checkpoint")] = False,
    overrides: dict[str, Any],
) -> None:
    """Train one model, print a sample, write a record and a checkpoint."""
    _set_threads(threads)
    text = load_corpus(corpus)
    model_fields = {item.name for item in fields(LocalGPTConfig)}
    model = {name: value for name, value in overrides.items() if name in model_fields}
    other = {name: value for name, value in overrides.items() if name not in model_fields}
    spec = resolve_spec(preset, model, other, text)
    select_device(device)
    checkpoint = out / f"{spec.digest}.safetensors"
    if resume:
        require(checkpoint.exists(), "resume", str(checkpoint), "this run has no checkpoint")
    with progress(spec.train.steps, f"{spec.model.method} seed {spec.seed}") as report:
        record, result = execute(
            spec,
            text,
            arm=spec.model.method,
            preset=preset,
            device=device,
            checkpoint=checkpoint,
            resume=resume,
            report=report,
        )
    if record is None:
        print(f"interrupted after step {result.steps_done}; checkpoint: {checkpoint}")
        print("the same command with --resume goes on")
        raise typer.Exit(130)
    path = record.write(out)
    if record.status != "finished":
        print(f"{record.status}: {record.error or _diverged(record)}; record: {path}")
        raise typer.Exit(1)
    print(record.sample)
    print(f"\nfinal validation loss {record.final_val_loss:.4f} nats per character, best", end=" ")
    print(f"{record.best_val_loss:.4f}; {record.wall_time_s:.0f} s, {record.tokens_per_s:.0f} tokens/s")
    print(f"record: {path}\ncheckpoint: {checkpoint}")


def _diverged(record: RunRecord) -> str:
    steps = [*record.curves["step"], *record.curves["val_step"]]
    return f"the loss was not finite at step {max(steps):.0f}"


@app.command()
def run(
    suite: Annotated[Path, typer.Argument(help="TOML file, for instance book/suites/01-baseline.toml")],
    preset: Annotated[str | None, typer.Option(help="instead of the suite's own")] = None,
    device: Device = "cpu",
    jobs: Annotated[int, typer.Option(help="runs side by side")] = 1,
    threads: Threads = 1,
    time_budget: Annotated[float | None, typer.Option(help="seconds; nothing starts that is longer")] = None,
    records: Records = RECORDS,
    out: Annotated[Path | None, typer.Option(help="folder for new records; default RECORDS/SUITE")] = None,
    corpus: CorpusName | None = None,
    only: Annotated[list[str] | None, typer.Option(help="digest of a run to make; repeatable")] = None,
) -> None:
    """Make the runs of a suite that are not yet recorded; can be stopped and started again."""
    _set_threads(threads)
    require_integer("jobs", jobs, 1)
    require(time_budget is None or time_budget > 0, "time_budget", time_budget, "must be positive")
    deadline = float("inf") if time_budget is None else time.monotonic() + time_budget
    select_device(device)
    plan = read_suite(suite)
    text = load_corpus(corpus or plan.corpus)
    suite_run = SuiteRun(plan, text, records, out or records / plan.name, preset, device, threads, deadline)
    if not only:
        complete = suite_run.all(jobs, _say)
        print(f"{plan.name}: " + ("complete" if complete else "not complete; start it again to go on"))
        return
    planned = {item.spec.digest: item for item in plan.plan(text, preset)}
    for digest in only:
        require(digest in planned, "only", digest, f"suite {plan.name} has " + ", ".join(planned))
        if suite_run.one(planned[digest], _say) is None:
            raise typer.Exit(3)


@app.command()
def table(
    suite: Annotated[Path | None, typer.Argument(help="suite; default: all records")] = None,
    records: Records = RECORDS,
    preset: Annotated[str | None, typer.Option(help="instead of the suite's own")] = None,
) -> None:
    """Print the recorded results: mean, spread and number of runs per arm."""
    from localgpt_core.tables import all_runs, arm_table, suite_runs

    found = load_records(records, _say)
    if suite is None:
        frame = all_runs(found)
    else:
        plan = read_suite(suite)
        frame = suite_runs(plan, found, load_corpus(plan.corpus), preset)
    require(len(frame) > 0, "records", str(records), "has no records of this suite")
    print(arm_table(frame).to_string(index=False))


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="a .safetensors file of localgpt train")],
    prompt: Annotated[str, typer.Option(help="text to continue")] = "\n",
    characters: Annotated[int, typer.Option(help="characters to write")] = 500,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    temperature: Annotated[float, typer.Option(help="below 1 is bolder")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="only the k likeliest characters")] = None,
) -> None:
    """Let a trained model write."""
    saved = load_checkpoint(checkpoint)
    model = LocalGPT(saved.model_config)
    saved.restore_model(model)
    alphabet = Corpus.alphabet(saved.corpus["name"], saved.corpus["vocabulary"])
    print(sample_text(model, alphabet, prompt, characters, seed=seed, temperature=temperature, top_k=top_k))


@app.command()
def verify(
    digest: Annotated[str, typer.Argument(help="digest of a record, or its beginning")],
    records: Records = RECORDS,
    device: Device = "cpu",
    threads: Threads = 1,
    corpus: CorpusName | None = None,
    tolerance: Annotated[float, typer.Option(help="nats, where the machine differs")] = 0.02,
) -> None:
    """Run a record's spec again and compare the curves."""
    from localgpt_core.verification import compare

    _set_threads(threads)
    found = load_records(records, _say)
    matching = [name for name in found if name.startswith(digest)]
    require(len(matching) == 1, "digest", digest, f"{len(matching)} of {len(found)} records match")
    recorded = found[matching[0]]
    require(recorded.status != "failed", "digest", digest, "is the record of a run that broke down")
    spec = recorded.run_spec
    with progress(spec.train.steps, f"verify {recorded.digest}") as report:
        again, _ = execute(spec, load_corpus(corpus or spec.corpus), device=device, report=report)
    if again is None:
        raise typer.Exit(130)
    verdict = compare(recorded, again, tolerance)
    print(verdict.text)
    if not verdict.agrees:
        raise typer.Exit(1)


@app.command()
def corpus(
    name: Annotated[
        str, typer.Argument(help="shakespeare, tinyshakespeare, complete or a text file")
    ] = "shakespeare",
    original: Annotated[Path | None, typer.Option(help="a text to compare with, line by line")] = None,
    floors: Annotated[bool, typer.Option(help="compute the n-gram floors")] = True,
) -> None:
    """Prepare a corpus and print what it is."""
    from localgpt_core.ngrams import floors as ngram_floors

    text = load_corpus(name)
    print(f"corpus      {text.name}")
    print(f"characters  {len(text.text):,}")
    print(f"vocabulary  {text.vocab_size} symbols: {text.vocabulary!r}")
    print(f"split       {len(text.train):,} train / {len(text.val):,} validation")
    print(f"sha256      {text.sha256}")
    if floors:
        print("floors      nats per character on the validation split")
        for order, loss in ngram_floors(text).items():
            print(f"  {order:<9} {loss:.3f}")
    if original is not None:
        other = (
            load_corpus("tinyshakespeare", path=original) if name == "shakespeare" else load_corpus(original)
        )
        print(f"agreement   {line_agreement(text.text, other.text):.1%} of the lines of {original.name}")


@app.command()
def bench(
    preset: Preset = "cpu",
    device: Device = "cpu",
    threads: Threads = 1,
    pairs: Annotated[int, typer.Option(help="paired measurements per row")] = 30,
) -> None:
    """Measure step time, memory and FLOPs of every rule and option relative to backpropagation."""
    from localgpt_core.bench import measure, render

    _set_threads(threads)
    require_integer("pairs", pairs, 1)
    print(render(measure(preset, select_device(device), pairs, _say)))


@app.command("export")
def export_records(
    bundle: Annotated[Path, typer.Argument(help="jsonl file to write")],
    records: Records = RECORDS,
) -> None:
    """Put all records into one jsonl file."""
    found = load_records(records, _say)
    export_bundle(found.values(), bundle)
    print(f"{len(found)} records: {bundle}")


@app.command("import")
def import_records(
    bundle: Annotated[Path, typer.Argument(help="jsonl file of localgpt export")],
    records: Records = RECORDS,
) -> None:
    """Take the records of a jsonl file into the folder of records."""
    written = import_bundle(bundle, records, _say)
    print(f"{len(written)} new records below {records}")


def main() -> None:
    """Run the command line; an error of the user's is one line and exit status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

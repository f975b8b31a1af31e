"""The command line: train, run, table, sample, verify, bench, corpus, export, import.

An error is one line on stderr, and the exit status says whose it is, see ``localgpt --help``.
"""

import os
import shlex
import sys
import traceback
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from localgpt_core.cli.options import (
    CorpusName,
    Device,
    Preset,
    Threads,
    say,
    text_of,
    with_config_options,
)
from localgpt_core.cli.progress import progress
from localgpt_core.cli.records import commands
from localgpt_core.cli.streams import abandon_stdout, steady_streams, tell
from localgpt_core.common.files import require_writable
from localgpt_core.common.validation import Refusal, require, require_integer
from localgpt_core.config import LocalGPTConfig
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.corpus.plays import line_agreement
from localgpt_core.experiments.execution import TRACEBACK_VARIABLE, execute, sample_text
from localgpt_core.experiments.records import RunRecord
from localgpt_core.experiments.specs import resolve_spec
from localgpt_core.experiments.suites import read_suite
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.settings import RunSettings

UsageError = typer.BadParameter.__base__  # typer does not export the class of all its usage errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Train and measure a character GPT whose linear layers choose how they learn.\n\n"
        "Exit status: 0 done; 1 a failure of the program or of the machine, a loss that was not finite, or a "
        "run that verify finds different; 2 an error of the user's; 3 no time left for a run of --only; "
        f"130 Ctrl-C. An error is one line, and {TRACEBACK_VARIABLE}=1 shows where it arose."
    ),
)


@app.command()
@with_config_options
def train(
    *,
    preset: Preset = "cpu",
    corpus: CorpusName = "shakespeare",
    device: Device = "cpu",
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="folder for the record and the checkpoint")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="go on from this run's checkpoint")] = False,
    diagnose_every: Annotated[
        int, typer.Option(help="steps between comparisons with the exact gradient; 0 = none")
    ] = 0,
    overrides: dict[str, Any],
) -> None:
    """Train one model, print a sample, write a record and a checkpoint."""
    settings = RunSettings(device=device, threads=threads, resume=resume, diagnose_every=diagnose_every)
    text = text_of(corpus, load_corpus(corpus))
    model_fields = {item.name for item in fields(LocalGPTConfig)}
    model = {name: value for name, value in overrides.items() if name in model_fields}
    other = {name: value for name, value in overrides.items() if name not in model_fields}
    spec = resolve_spec(preset, model, other, text)
    checkpoint = out / f"{spec.digest}.safetensors"
    require_writable("out", checkpoint)
    if resume:
        require(checkpoint.exists(), "resume", str(checkpoint), "this run has no checkpoint")
    with progress(spec.train.steps, f"{spec.model.method} seed {spec.seed}") as report:
        settings = replace(settings, checkpoint=checkpoint, report=report)
        record, result = execute(spec, text, settings, arm=spec.model.method, preset=preset, out=out)
    if record is None:
        tell(f"interrupted after step {result.steps_done}; checkpoint: {checkpoint}")
        tell("the same command with --resume goes on")
        raise typer.Exit(130)
    path = record.write(out)
    if record.status != "finished":
        tell(f"{record.status}: {_first_line(record.error) or _diverged(record)}; record: {path}")
        raise typer.Exit(1)
    tell(record.sample or _first_line(record.error))
    losses = f"final validation loss {record.final_val_loss:.4f} nats per character, best"
    speed = f"{record.wall_time_s:.0f} s, {record.tokens_per_s:.0f} tokens/s"
    tell(f"\n{losses} {record.best_val_loss:.4f}; {speed}\nrecord: {path}\ncheckpoint: {checkpoint}")


def _diverged(record: RunRecord) -> str:
    steps = [*record.curves["step"], *record.curves["val_step"]]
    return f"the loss was not finite at step {max(steps):.0f}"


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="a .safetensors file of localgpt train")],
    prompt: Annotated[str | None, typer.Option(help="text to continue; default: a line break")] = None,
    characters: Annotated[int, typer.Option(help="characters to write")] = 500,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    temperature: Annotated[float, typer.Option(help="below 1 is bolder")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="only the k likeliest characters")] = None,
) -> None:
    """Let a trained model write."""
    saved = load_checkpoint(checkpoint)
    model = LocalGPT(saved.model_config)
    saved.restore_model(model)
    vocabulary = saved.corpus["vocabulary"]
    print(sample_text(model, vocabulary, prompt, characters, seed=seed, temperature=temperature, top_k=top_k))


@app.command()
def corpus(
    name: Annotated[
        str, typer.Argument(help="shakespeare, tinyshakespeare, complete or a text file")
    ] = "shakespeare",
    original: Annotated[Path | None, typer.Option(help="a text to compare with, line by line")] = None,
    floors: Annotated[bool, typer.Option(help="compute the n-gram floors")] = True,
) -> None:
    """Prepare a corpus and print what it is."""
    from localgpt_core.corpus.ngrams import floors as ngram_floors

    text = text_of(name, load_corpus(name))
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
    suite: Annotated[Path | None, typer.Argument(help="measure the arms of this suite instead")] = None,
    preset: Preset = "cpu",
    device: Device = "cpu",
    threads: Threads = 1,
    pairs: Annotated[int, typer.Option(help="paired measurements per row")] = 30,
    out: Annotated[Path | None, typer.Option(help="write the rows to this JSON file too")] = None,
) -> None:
    """Measure step time, memory and FLOPs of every rule and option relative to backpropagation."""
    from localgpt_core.experiments.bench import measure, render, write_rows

    settings = RunSettings(device=device, threads=threads)
    require_integer("pairs", pairs, 1)
    if out is not None:
        require_writable("out", out)
    arms = None if suite is None else read_suite(suite)
    rows = measure(preset, settings.prepare(), pairs, say, arms)
    if out is not None:
        write_rows(rows, out, preset, device)
    print(render(rows))


app.add_typer(commands)


def main() -> None:
    """Run the command line and exit with the status that its help explains; an error is one line."""
    with steady_streams():
        status = _status()
    sys.exit(status)


def _status() -> int:
    """Return the exit status of the command that was asked for."""
    try:
        status = app(standalone_mode=False) or 0
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # a reader of stdout that has gone away
        return stop.code if isinstance(stop.code, int) else 1
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        if isinstance(error, UsageError) and len(sys.argv) == 1:
            error.show()  # the help
        elif isinstance(error, UsageError):
            given = shlex.join(["localgpt", *sys.argv[1:]])
            say(f"error: {_one_line(error.format_message())} (in: {_one_line(given)}; --help tells more)")
        elif isinstance(error, Refusal):
            say(f"error: {_one_line(str(error))}")
        else:
            if isinstance(error, OSError):
                abandon_stdout()
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            say(f"error: {kind}{_first_line(str(error))} ({TRACEBACK_VARIABLE}=1 shows where)")
        return 2 if isinstance(error, UsageError | Refusal) else 1


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def _first_line(text: str) -> str:
    return text.partition("\n")[0]

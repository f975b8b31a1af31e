"""The command line: one file for each kind of command, and here those that are of no kind.

An error is one line on stderr, and the exit status says whose it is, see ``localgpt --help``.
"""

import os
import re
import shlex
import sys
import traceback
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated

import typer

from localgpt_core.cli import options, plots, records, suites, training
from localgpt_core.cli.options import Device, Overwrite, Preset, Threads, require_absent, say, text_of
from localgpt_core.cli.streams import abandon_stdout, starting, steady_streams
from localgpt_core.common.environment import TRACEBACK_VARIABLE, code_version
from localgpt_core.common.files import atomic_write, require_writable
from localgpt_core.common.validation import Refusal, printable, require, require_integer

MOST_PAIRS = 1_000_000
LONGEST_SAMPLE = 1_000_000  # characters
LONGEST_LINE = 4000  # characters of an error; nobody reads more
UsageError = typer.BadParameter.__base__  # typer does not export the class of all its usage errors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train and measure a character GPT whose linear layers choose how they learn.\n\n"
        "Exit status: 0 done; 1 a failure of the program or of the machine, a loss that was not finite, a "
        "run that verify finds different, or a page that states a claim otherwise than the records; 2 an "
        "error of the user's; 3 a suite whose time is over; 4 a run that another process is making; 130 "
        f"Ctrl-C. An error is one line, and {TRACEBACK_VARIABLE}=1 shows where it arose."
    ),
)

others = typer.Typer()


def _print_version(asked: bool) -> None:
    if not asked:
        return
    found = code_version(Path(__file__))
    changed = " with changes" if found["git_dirty"] else ""
    commit = f", commit {found['git_commit']}{changed}" if found["git_commit"] else ""
    print(f"localgpt {_version_of('localgpt')} (torch {_version_of('torch')}{commit})")
    raise typer.Exit


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@app.callback()
def every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print versions and commit, and exit"
        ),
    ] = False,
) -> None:
    """Take what is said before the command's name."""


@others.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="a .safetensors file of localgpt train")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="text to continue; repeatable", show_default="a line break")
    ] = None,
    characters: Annotated[int, typer.Option(help="characters to write")] = 500,
    seed: Annotated[int, typer.Option(help="seed of the sampling, an integer")] = 0,
    temperature: Annotated[
        float, typer.Option(help="below 1 keeps to likelier characters (more cautious), above 1 is bolder")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="number of likeliest characters to draw among", show_default="all")
    ] = None,
    window: Annotated[
        str,
        typer.Option(
            help="what is seen of a text longer than the model's context of K characters: exact, the last K, "
            "for which all K are computed anew for each character; halves, the last K/2 to K, for which two "
            "are, as a full context is cut to its later half and grows again"
        ),
    ] = "exact",
) -> None:
    """Let a trained model write.

    Each of several prompts is continued by draws of its own, the first as it is alone, and stands below a
    line with its number.
    """
    with starting():
        from localgpt_core.corpus.vocabulary import first_prompt
        from localgpt_core.model.gpt import LocalGPT
        from localgpt_core.model.sampling import sample_texts
        from localgpt_core.training.checkpoints import load_checkpoint
    require_integer("characters", characters, 0, LONGEST_SAMPLE)
    saved = load_checkpoint(checkpoint)
    model = LocalGPT(saved.model_config)
    saved.restore_model(model)
    vocabulary = saved.corpus["vocabulary"]
    prompts = prompt or [first_prompt(vocabulary)]
    options = {"seed": seed, "temperature": temperature, "top_k": top_k, "window": window}
    texts = sample_texts(model, vocabulary, prompts, characters, **options)
    for number, text in enumerate(texts, start=1):
        print(text if len(texts) == 1 else f"--- {number} of {len(texts)}\n{text}")


@others.command()
def corpus(
    name: Annotated[str, typer.Argument(help=options.CORPUS_HELP)] = "shakespeare",
    original: Annotated[
        Path | None, typer.Option(help="text file to compare with, line by line", show_default="none")
    ] = None,
    floors: Annotated[bool, typer.Option(help="compute the n-gram floors")] = True,
    export: Annotated[
        Path | None,
        typer.Option(
            help="file to write the text to; given as --corpus FILE to a machine that cannot build it, it is "
            "the same corpus",
            show_default="none",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Prepare a corpus and print what it is."""
    with starting():
        from localgpt_core.corpus.corpus import load_corpus
        from localgpt_core.corpus.ngrams import floors as ngram_floors
        from localgpt_core.corpus.plays import line_agreement
    if export is not None:
        require_writable("export", export)
        require_absent("export", export, overwrite)
    text = text_of(name, load_corpus(name))
    if export is not None:
        atomic_write(export, text.text)
    print(f"corpus      {text.name}")
    print(f"characters  {len(text.text):,}")
    print(f"vocabulary  {text.vocab_size} symbols: {text.vocabulary!r}")
    print(f"split       {len(text.train):,} train / {len(text.val):,} validation")
    print(f"sha256      {text.sha256}")
    if text.sequences:
        period, answers = text.sequences.period, len(text.sequences.answers)
        print(f"sequences   {period} characters each, {answers} of them answers")
        print(f"chance      {text.sequences.chance:.1%} of the answers")
    if export is not None:
        print(f"export      {export}")
    if floors:
        print(f"floors      nats per {'answer' if text.sequences else 'character'} on the validation split")
        for order, loss in ngram_floors(text).items():
            print(f"  {order:<9} {loss:.3f}")
    if original is not None:
        other = (
            load_corpus("tinyshakespeare", path=original) if name == "shakespeare" else load_corpus(original)
        )
        print(f"agreement   {line_agreement(text.text, other.text):.1%} of the lines of {original.name}")


@others.command()
def bench(
    suite: Annotated[
        Path | None,
        typer.Argument(
            help="TOML file of a suite, whose arms are measured", show_default="every rule and option"
        ),
    ] = None,
    preset: Preset = "cpu",
    device: Device = "cpu",
    threads: Threads = 1,
    pairs: Annotated[int, typer.Option(help="paired measurements per row; steps per profile")] = 30,
    out: options.RowsFile = None,
    profile: options.ProfileInstead = False,
    trace: options.TraceFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure step time, memory and FLOPs relative to backpropagation, tokens/s and share of GEMM peak."""
    with starting():
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler prints when it starts and stops
        from localgpt_core.bench import Peaks, measure, render, write_rows
        from localgpt_core.bench import profile as profiling
        from localgpt_core.experiments.suites import read_suite
        from localgpt_core.training.settings import RunSettings
    settings = RunSettings(device=device, threads=threads)
    require_integer("pairs", pairs, 1, MOST_PAIRS)
    require(not (profile and out), "out", str(out), "is for the rows, which --profile does not measure")
    require(profile or trace is None, "trace", str(trace), "needs --profile")
    arms = None if suite is None else read_suite(suite)
    shown = profiling.profiled(arms)
    traces = [] if trace is None else profiling.trace_files(shown, trace)
    for field, path in [("out", out)] * (out is not None) + [("trace", path) for path in traces]:
        require_writable(field, path)
        require_absent(field, path, overwrite)
    peaks = Peaks(settings.prepare())
    if profile:
        table = profiling.render_profiles(profiling.profiles(preset, peaks, pairs, say, shown, traces))
    else:
        rows = measure(preset, peaks.device, pairs, say, arms, peaks)
        table = render(rows)
        if out is not None:
            write_rows(rows, out, preset, device, peaks.gflops)
    print(table, peaks, sep="\n\n")


for part in (
    training.commands,
    suites.commands,
    records.commands,
    plots.commands,
    others,
):  # the order of the help
    app.add_typer(part)


def main() -> None:
    """Run the command line and exit with the status that its help explains; an error is one line."""
    with steady_streams():
        status = _status()
    sys.exit(status)


def _status() -> int:
    """Return the exit status of the command that was asked for."""
    try:
        status = training.led(app)
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
        elif isinstance(error, ModuleNotFoundError) and (package := _package_of(error.name or "")):
            say(f'error: this needs {error.name}, which is not installed: pip install "{package}"')
            return 2
        else:
            if isinstance(error, OSError):
                abandon_stdout()
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            first_line = str(error).partition("\n")[0]
            say(f"error: {kind}{_one_line(first_line)} ({TRACEBACK_VARIABLE}=1 shows where)")
        return 2 if isinstance(error, UsageError | Refusal) else 1


def _package_of(module: str) -> str:
    """Return what to install for a module that is missing: this package with an extra; else nothing."""
    package = module.partition(".")[0]
    try:
        needed = requires("localgpt") or []
    except PackageNotFoundError:
        return ""
    for line in needed:
        if re.match(r"[\w.-]+", line)[0] == package:
            extra = re.search(r"extra == ['\"](\w+)", line)
            return f"localgpt[{extra[1]}]" if extra else "localgpt"
    return ""


def _one_line(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:LONGEST_LINE]}..."

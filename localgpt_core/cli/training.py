"""The command that trains: one run, or one for each of several seeds; and what several processes train."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localgpt_core.cli.options import (
    Accumulate,
    CorpusName,
    Device,
    Overwrite,
    Preset,
    Threads,
    Track,
    text_of,
    tracker_named,
    with_config_options,
)
from localgpt_core.cli.streams import progress, say, starting, tell
from localgpt_core.common.files import LONGEST_INTEGER, require_writable
from localgpt_core.common.validation import Refusal, require
from localgpt_core.config import LocalGPTConfig
from localgpt_core.config import preset as configurations

if TYPE_CHECKING:
    from localgpt_core.corpus.corpus import Corpus
    from localgpt_core.records import RunRecord
    from localgpt_core.records.specs import RunSpec
    from localgpt_core.training.settings import RunSettings

__all__ = ["commands", "led"]

commands = typer.Typer()

AUTO = "auto"  # the learning rate that a search recorded


@commands.command()
@with_config_options
def train(
    *,
    preset: Preset = "cpu",
    corpus: CorpusName = "shakespeare",
    device: Device = "cpu",
    threads: Threads = 1,
    accumulate: Accumulate = 1,
    out: Annotated[Path, typer.Option(help="folder for the record and the checkpoint")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="go on from this run's checkpoint")] = False,
    overwrite: Overwrite = False,
    diagnose_every: Annotated[
        int, typer.Option(help="steps between comparisons with the exact gradient; 0 = none")
    ] = 0,
    track: Track = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="a run and a record for each, one after the other, such as 1,2,3",
            show_default="--seed alone",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with tables model and train, as an arm of a suite has; options given here win",
            show_default="none",
        ),
    ] = None,
    overrides: dict[str, Any],
) -> None:
    """Train one model, print a sample, write a record and a checkpoint.

    Several processes, torchrun --nproc-per-node N -m localgpt_core train ..., make the same run together.
    """
    with starting():
        from localgpt_core.corpus.corpus import load_corpus
        from localgpt_core.experiments.execution import left_to_do
        from localgpt_core.experiments.locks import claim
        from localgpt_core.parallel import launched
        from localgpt_core.records.specs import resolve_spec
        from localgpt_core.training.before import check_corpus
        from localgpt_core.training.settings import RunSettings

    settings = RunSettings(
        device=device,
        threads=threads,
        resume=resume,
        diagnose_every=diagnose_every,
        accumulate=accumulate,
        processes=launched(),
        tracker=tracker_named(track),
    )
    numbers = None if seeds is None else _numbers(seeds, "seed" in overrides)
    text = text_of(corpus, load_corpus(corpus))
    model, run, source = _fields(preset, config, overrides, text.vocab_size)
    asked = [run] if numbers is None else [{**run, "seed": number} for number in numbers]
    specs = [resolve_spec(preset, model, values, text) for values in asked]
    for spec in specs:
        check_corpus(spec.model, spec.train, text)
        settings.split.require_fits(spec.train.batch_size)
        require_writable("out", out / f"{spec.digest}.safetensors")
    failed = False
    todo = left_to_do(specs, out, resume=resume, overwrite=overwrite)
    if source:
        say(source)
    for spec in specs:
        if spec not in todo:
            say(f"{_title(spec)}: finished before, record: {out / spec.digest}.json")
    to_go_on = "--resume instead of --overwrite" if overwrite else "--resume"
    for spec in todo:
        if len(specs) > 1:
            tell(f"{_title(spec)}:")
        with claim(spec.digest, out, out) as mine:
            require(mine, "out", str(out), f"another process is making the run {spec.digest} there")
            failed |= not _one(spec, text, settings, preset, out, to_go_on)
    if failed:
        raise typer.Exit(1)


def _fields(
    preset: str, config: Path | None, overrides: dict[str, Any], vocab_size: int
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the fields of model and run, and where a learning rate that nobody named comes from."""
    from localgpt_core.config.rates import recorded_rate
    from localgpt_core.experiments.suites import read_config

    model, run = ({}, {}) if config is None else read_config(config)
    rate = overrides.pop("lr", AUTO if config is None else None)
    model_fields = {item.name for item in fields(LocalGPTConfig)}
    model |= {name: value for name, value in overrides.items() if name in model_fields}
    run |= {name: value for name, value in overrides.items() if name not in model_fields}
    if rate is None:
        return model, run, ""
    if rate == AUTO:
        run.pop("lr", None)
        found = recorded_rate(preset, *configurations(preset, {"vocab_size": vocab_size, **model}, run))
        return model, {**run, "lr": found.lr}, f"lr={found.lr:g}, {found.source}"
    try:
        return model, {**run, "lr": float(rate)}, ""
    except ValueError:
        raise Refusal(f"lr={rate!r}: must be a number or {AUTO}") from None


def _numbers(seeds: str, with_seed: bool) -> list[int]:
    allowed = "must be different integers with commas between them, such as 1,2,3"
    parts = [part.strip() for part in seeds.split(",")]
    valid = all(part.isascii() and part.isdecimal() and len(part) <= LONGEST_INTEGER for part in parts)
    require(valid, "seeds", seeds, allowed)
    numbers = [*map(int, parts)]
    require(len({*numbers}) == len(numbers), "seeds", seeds, allowed)
    require(not with_seed, "seeds", seeds, "--seed names another one; give either")
    return numbers


def _title(spec: RunSpec) -> str:
    return f"{spec.model.method} seed {spec.seed}"


def _one(spec: RunSpec, text: Corpus, settings: RunSettings, preset: str, out: Path, to_go_on: str) -> bool:
    """Make one run and say what came out; return whether it finished."""
    from localgpt_core.experiments.execution import execute, steps_done
    from localgpt_core.records import read_record

    checkpoint = out / f"{spec.digest}.safetensors"
    done = steps_done(checkpoint) if settings.resume else 0
    with progress(spec.train.steps, _title(spec), done) as report:
        settings = replace(settings, checkpoint=checkpoint, report=report)
        record, result = execute(spec, text, settings, arm=spec.model.method, preset=preset, out=out)
    if record is None:
        tell(f"interrupted after step {result.steps_done}; checkpoint: {checkpoint}")
        tell(f"the same command with {to_go_on} goes on")
        raise typer.Exit(130)
    path = record.write(out)
    if record.status != "finished":
        kept = read_record(path).status
        file = "record" if kept == record.status else f"the record of a run that {kept} stays"
        tell(f"{record.status}: {_first_line(record.error) or _diverged(record)}; {file}: {path}")
        return False
    tell(record.sample or _first_line(record.error))
    tell(_curve(record, text))
    unit = "answer" if text.sequences else "character"
    losses = f"final validation loss {record.final_val_loss:.4f} nats per {unit}, best"
    speed = f"{record.wall_time_s:.0f} s, {record.tokens_per_s:.0f} tokens/s"
    if record.final_val_accuracy is not None:
        chance = text.sequences.chance
        tell(f"{record.final_val_accuracy:.1%} of the answers are right; chance is {chance:.1%}")
    tell(f"{losses} {record.best_val_loss:.4f}; {speed}\nrecord: {path}\ncheckpoint: {checkpoint}")
    if result.interrupted:
        raise typer.Exit(130)
    return True


def _curve(record: RunRecord, text: Corpus) -> str:
    """Return the validation curve of a finished run and the floors it is below, or why there is none."""
    from localgpt_core.cli.plots import drawn, floors_passed
    from localgpt_core.corpus.known import CHEAP
    from localgpt_core.corpus.ngrams import floors

    try:
        curve = drawn({"validation loss": (record.curves["val_step"], record.curves["val_loss"])}, "nats")
        cheap = len(text.text) <= CHEAP and not text.sequences
        passed = floors_passed(record.final_val_loss, floors(text)) if cheap else ""
    except Exception as error:
        return f"no curve: {type(error).__name__}: {error}"
    return "\n".join(["", *filter(None, (curve, passed))])


def _diverged(record: RunRecord) -> str:
    steps = [*record.curves["step"], *record.curves["val_step"]]
    return f"the loss was not finite at step {max(steps):.0f}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def led(app: typer.Typer) -> int:
    """Return the exit status of the command, which the first of torchrun's processes runs for all.

    The others take part in the runs that it trains. One of them all says why they end, if they fail.
    """
    from localgpt_core.parallel import ProcessLost, launched  # without torch

    with starting():
        processes = launched()
    if processes.count == 1:
        return app(standalone_mode=False) or 0
    with starting():
        from localgpt_core.training.loop import follow
    try:
        if processes.rank == 0:
            return app(standalone_mode=False) or 0
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one stops for all
        follow(processes)
        return 0
    except Exception as error:
        if (processes.rank or isinstance(error, ProcessLost)) and not processes.speaks():
            raise SystemExit(1) from None
        raise
    finally:
        if processes.rank == 0:
            with suppress(ProcessLost):
                processes.end()

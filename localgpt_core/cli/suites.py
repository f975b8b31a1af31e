"""The commands that make the runs of suites, and say how far they are: run, status, campaign."""

import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from localgpt_core.cli import options
from localgpt_core.cli.options import (
    BOOK_RECORDS,
    Accumulate,
    Device,
    NewRecords,
    OtherCorpus,
    OtherPreset,
    Records,
    Threads,
    Track,
    say,
    text_of,
    tracker_named,
)
from localgpt_core.cli.streams import announced, interrupt_at_the_end_of_stdin, progress, starting, tell
from localgpt_core.common.files import LONGEST_INTEGER
from localgpt_core.common.validation import require, require_choice, require_integer

__all__ = ["commands"]

commands = typer.Typer()

MOST_JOBS = 1024  # processes, each of which imports torch
AUTO = "auto"
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # where torch keeps what it has compiled
LONGEST_RESERVE_S, RESERVED_SHARE = 20.0, 0.05


@commands.command()
def run(
    suite: Annotated[Path, typer.Argument(help="TOML file of a suite, such as book/suites/baseline.toml")],
    preset: OtherPreset = None,
    device: Device = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(
            help="number of runs side by side", show_default="1; with ray and slurm as many as find room"
        ),
    ] = None,
    threads: Threads = 1,
    accumulate: Accumulate = 1,
    time_budget: Annotated[
        float | None,
        typer.Option(
            help="seconds; then the run of that moment is left unfinished. With slurm those of each job",
            show_default="no limit",
        ),
    ] = None,
    records: Records = BOOK_RECORDS,
    out: NewRecords = None,
    corpus: OtherCorpus = None,
    track: Track = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="digest of a run to make if it is not yet recorded; repeatable", show_default="all of them"
        ),
    ] = None,
    engine: options.Engine = "local",
    address: options.Address = None,
    gpu_share: options.GpuShare = None,
    retries: options.Retries = None,
    dry_run: options.DryRun = False,
    sbatch: options.Sbatch = None,
    stop_with_stdin: Annotated[
        bool, typer.Option("--stop-with-stdin", hidden=True, help="stop as after Ctrl-C when stdin ends")
    ] = False,
) -> None:
    """Make the runs of a suite that are not yet recorded; can be stopped and started again.

    A run that is stopped goes on from where it was, bit for bit. One that another process is making is waited
    for, or, asked for by its digest, left to it (exit status 4).
    """
    if stop_with_stdin:
        interrupt_at_the_end_of_stdin()
    with starting():
        from localgpt_core.corpus.corpus import load_corpus
        from localgpt_core.engines import ENGINES, array_script, ray_runs, submit, watching
        from localgpt_core.experiments.processes import STATUSES
        from localgpt_core.experiments.scheduler import SuiteRun
        from localgpt_core.experiments.suites import read_suite
        from localgpt_core.parallel import launched
        from localgpt_core.training.settings import RunSettings

        if engine == "ray":
            import ray  # noqa: F401 -- refused at once where it is missing
    require_choice("engine", engine, ENGINES)
    of_ray = {"address": address, "gpu_share": gpu_share, "retries": retries}
    of_ray = {name: value for name, value in of_ray.items() if value is not None}
    of_slurm = {name: value for name, value in (("dry_run", dry_run), ("sbatch", sbatch)) if value}
    for own, given in (("ray", of_ray), ("slurm", of_slurm)):
        for name, value in given.items():
            require(engine == own, name, value, f"is for --engine {own}")
    number = jobs if jobs is not None else 1 if engine == "local" else MOST_JOBS
    require_integer("jobs", number, 1, MOST_JOBS)
    processes, shared = launched(), "under torchrun, whose processes share a run"
    require(engine == "local" or processes.count == 1, "engine", engine, f"must be local {shared}")
    require(number == 1 or processes.count == 1, "jobs", number, f"must be 1 {shared}")
    require(time_budget is None or time_budget > 0, "time_budget", time_budget, "must be positive")
    deadline = time.monotonic() + (time_budget or math.inf)
    parts = {"accumulate": accumulate, "processes": processes}
    if engine != "local":
        require_choice("device", device, ("cpu", "cuda"))
    far = engine == "slurm" or address is not None  # the devices of this machine say nothing of those
    more = {"deadline": deadline, "tracker": tracker_named(track)}
    settings = RunSettings(device="cpu" if far else device, threads=threads, **more, **parts)
    plan = read_suite(suite)
    text = load_corpus(corpus or plan.corpus)
    if not only:  # runs side by side are asked for one by one, and need not all say it
        text_of(corpus or plan.corpus, text)
    folder = out or records / plan.name
    show = announced if only else progress  # runs side by side are asked for one by one
    suite_run = SuiteRun(plan, text, records, folder, settings, preset, corpus or plan.corpus, show)
    todo = []  # nothing is started for nothing; what is wrong with records, `make` says
    if engine != "local":
        todo = suite_run.ready(say if engine == "slurm" else lambda problem: None, only or ())
    if todo and engine == "slurm":
        limits = {"jobs": jobs, "limit_s": time_budget, "device": device, "site": sbatch or ()}
        script = array_script(suite_run, todo, **limits)
        print(script if dry_run else submit(script), end="" if dry_run else "\n")
        raise typer.Exit
    with ExitStack() as stack:
        if todo and engine == "ray":
            begin = stack.enter_context(ray_runs(suite_run, say, jobs=jobs, device=device, **of_ray))
            suite_run = replace(suite_run, begin=begin)
        if suite_run.begin is not None or number > 1:
            on_terminal = sys.stderr is not None and sys.stderr.isatty()
            suite_run = replace(suite_run, hear=say if on_terminal else None)
            stack.enter_context(watching(suite_run, sys.stderr, say))
        outcome = suite_run.make(number, say, only or ())
    if not only:
        to_go_on = "complete" if outcome == "complete" else "not complete; start it again to go on"
        tell(f"{plan.name}: {to_go_on}")
    raise typer.Exit(STATUSES[outcome])


@commands.command()
def status(
    suite: Annotated[Path, typer.Argument(help="TOML file of a suite")],
    preset: OtherPreset = None,
    records: Records = BOOK_RECORDS,
    out: NewRecords = None,
    corpus: OtherCorpus = None,
    watch: Annotated[bool, typer.Option("--watch", help="go on until all runs are recorded")] = False,
) -> None:
    """Say how far the runs of a suite are, whoever makes them: step, loss, speed, time left."""
    with starting():
        from localgpt_core.corpus.corpus import load_corpus
        from localgpt_core.engines import EVERY_S, Watch, screen, summary, table
        from localgpt_core.experiments.making import RunMaker
        from localgpt_core.experiments.suites import read_suite
    plan = read_suite(suite)
    text = load_corpus(corpus or plan.corpus)
    watched = Watch(RunMaker(plan, text, records, out or records / plan.name, preset=preset))
    states = watched.look()
    with screen(sys.stdout, print) as show:
        while watch and not watched.is_over:
            show(states)
            time.sleep(EVERY_S)
            states = watched.look()
    print(f"{table(states)}\n{summary(states)}")


@commands.command()
def campaign(
    out: Annotated[Path, typer.Option(help="folder for all that is made; the next call goes on there")],
    ranking: Annotated[Path, typer.Argument(help="TOML file of stages, in the order of their worth")] = Path(
        "book/campaign.toml"
    ),
    preset: OtherPreset = None,
    device: Device = "cpu",
    jobs: Annotated[
        str | None,
        typer.Option(
            help="number of runs side by side; auto = as many as a short training shows to be fastest",
            show_default="auto on cuda, else 1",
        ),
    ] = None,
    threads: Threads = 1,
    time_budget: Annotated[
        float | None,
        typer.Option(help="seconds after which the command has ended", show_default="no limit"),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="begin only runs that are likely to end: nothing goes on later")
    ] = False,
    records: Records = BOOK_RECORDS,
    corpus: OtherCorpus = None,
) -> None:
    """Make what is missing of many suites, the most valuable first, on a machine that is lent for minutes.

    OUT/campaign.jsonl holds all records made there, for localgpt import, and is whole whenever the command
    ends or is killed; OUT/rates.toml the learning rates that a search found, OUT/bench-PRESET.json the step
    times. A run that is cut goes on with the next call, bit for bit.
    """
    began = time.monotonic()
    os.environ.setdefault(COMPILED, str((out / "work" / "compiled").absolute()))
    with starting():
        from localgpt_core.campaigns import Campaign
        from localgpt_core.experiments.processes import STATUSES
        from localgpt_core.parallel import launched
        from localgpt_core.training.settings import RunSettings
    allowed = "processes of torchrun share a run, and those of a campaign go side by side"
    require(launched().count == 1, "WORLD_SIZE", launched().count, allowed)
    number = _number_of(jobs or (AUTO if device.startswith("cuda") else "1"))
    require(time_budget is None or time_budget > 0, "time_budget", time_budget, "must be positive")
    budget = float("inf") if time_budget is None else time_budget
    deadline = began + budget - min(LONGEST_RESERVE_S, RESERVED_SHARE * budget)
    settings = RunSettings(device=device, threads=threads, deadline=deadline)
    options = {"preset": preset, "corpus": corpus, "whole": whole, "show": progress}
    outcome = Campaign(ranking, out, records, settings, **options).make(number, say)
    tell(f"campaign: {'complete' if outcome == 'complete' else 'not complete; start it again to go on'}")
    raise typer.Exit(STATUSES[outcome])


def _number_of(jobs: str) -> int | None:
    """Return the number of runs side by side, None if it is to be measured."""
    if jobs == AUTO:
        return None
    number = jobs.isascii() and jobs.isdecimal() and len(jobs) <= LONGEST_INTEGER
    require(number, "jobs", jobs, f"must be a number or {AUTO}")
    require_integer("jobs", int(jobs), 1, MOST_JOBS)
    return int(jobs)

r"""One training loop for every rule.

A step s of a run with seed r is a pure function of (state, r, s): its batch, its dropout masks and its probes
are drawn from keys that contain r and s (`localgpt_core.common.seeds`). A run that was stopped and resumed
therefore gives the same curve, to the last bit, as one that was not.
"""

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from localgpt_core.common.environment import wait_for
from localgpt_core.common.files import require_writable
from localgpt_core.common.notebooks import watched
from localgpt_core.common.validation import Refusal
from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.parallel.processes import Group, Processes
from localgpt_core.training.before import check_corpus
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.settings import Report, RunSettings
from localgpt_core.training.state import RunState, TrainResult

__all__ = ["TrainResult", "follow", "train"]

WARM_UP_STEPS, MEASURED_STEPS = 5, 20


def train(
    model_config: LocalGPTConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    settings: RunSettings | None = None,
    **fields: Any,
) -> TrainResult:
    """Train a model and return it with its curves.

    Args:
        model_config: The model and its rule; ``vocab_size`` must be the corpus's.
        train_config: The run.
        corpus: Where the batches and the validation split come from.
        settings: Where and how the run goes.
        fields: Fields of `RunSettings` by name, in its place: ``device``, ``threads``, ``checkpoint``,
            ``resume``, ``deadline``, ``report``, ``diagnose_every``, ``accumulate``, ``processes``,
            ``tracker``.

    Raises:
        ValueError: For a corpus that does not fit the model, a device that is not there, a batch that has no
            equal parts, or a checkpoint that is damaged, of another run, or cannot be written.
        ProcessLost: If another process of the run ended.
        OSError: If the checkpoint of a run that was interrupted, or ran out of time, cannot be written. A run
            that goes on, or is over, outweighs its checkpoint, and only warns.
    """
    settings = RunSettings.given(settings, fields)
    check_corpus(model_config, train_config, corpus)
    settings.split.require_fits(train_config.batch_size)
    device, path = settings.prepare(), settings.checkpoint
    if path is not None:
        require_writable("checkpoint", path)
    resumes = settings.resume and path is not None and Path(path).exists()
    saved = load_checkpoint(path) if resumes else None
    run_of = (model_config, train_config, corpus)
    job = (*run_of, saved, torch.device(settings.device).type, settings.threads, settings.accumulate)
    with _forked(device, settings.processes), settings.processes.making(job):
        run = RunState(*run_of, device, settings.diagnose_every, saved, settings.split)
        title = f"{model_config.method} seed {train_config.seed}"
        watch = nullcontext(settings.report) if settings.report else watched(train_config.steps, title)
        with _interrupt_between_steps(settings.processes) as interrupted:
            with watch as report:
                status = _advance_to_the_end(run, settings, report, interrupted)
            if path is not None and status in ("interrupted", "out_of_time"):
                run.save(Path(path))
            elif path is not None and status == "finished":
                _save_or_warn(run, Path(path))
            return run.result(status, interrupted.is_set())


def follow(processes: Group) -> None:
    """Take part in every run that the first of ``processes`` trains, until it ends; write and say nothing."""
    for *run_of, saved, device, threads, accumulate in processes.jobs():
        given = {"device": device, "threads": threads, "accumulate": accumulate, "processes": processes}
        settings = RunSettings(**given)
        with _forked(device := settings.prepare(), processes):
            try:
                run = RunState(*run_of, device, checkpoint=saved, split=settings.split)
            except Refusal:  # the first process refuses it, too
                run = None
            while (word := processes.heard()) != "end":
                {"advance": run.advance, "evaluate": run.evaluate}[word]()


def _forked(device: torch.device, processes: Processes) -> AbstractContextManager[None]:
    """Give back torch's random state after the ``with`` block; of several processes each has its own GPU."""
    own = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(own if processes.count > 1 else range(torch.cuda.device_count()))


def _save_or_warn(run: RunState, path: Path) -> None:
    try:
        run.save(path)
    except (OSError, RuntimeError, MemoryError) as error:
        warnings.warn(f"checkpoint {path} of step {run.step} is not written: {error}", stacklevel=2)


@contextmanager
def _interrupt_between_steps(processes: Processes) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is cut in half; the second one raises as usual.

    Of several processes, which Ctrl-C reaches twice, as torchrun hands it on, every later one is ignored.

    Outside the main thread, where Python allows no signal handlers, the event is never set.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    usual = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, usual if processes.count == 1 else signal.SIG_IGN)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


def _advance_to_the_end(
    run: RunState, settings: RunSettings, report: Report, interrupted: threading.Event
) -> str:
    """Advance ``run`` until it is over and return the status."""
    first_step, measured_from, log = run.step, 0.0, None
    if settings.tracker is not None:
        from localgpt_core.tracking.log import RunLog

        log = RunLog(settings.tracker, run)
    while True:
        if run.evaluation_due:
            settings.processes.tell("evaluate")
            loss = run.evaluate()
            report({"step": run.step, "val_loss": loss})
            if log is not None:
                log.evaluation()
            if not math.isfinite(loss):
                return "diverged"
            if settings.checkpoint is not None and run.step > first_step:
                _save_or_warn(run, Path(settings.checkpoint))
        if run.diagnosis_due:
            run.diagnose()
            if log is not None:
                log.diagnosis()
        if run.step == run.config.steps:
            return "finished"
        if interrupted.is_set():
            return "interrupted"
        settings.processes.tell("advance")
        point = run.advance()
        if point is not None:
            report({"step": run.step, "train_loss": point})
            if log is not None:
                log.point()
            if not math.isfinite(point):
                return "diverged"
        needed_s = 0.0
        if run.step == first_step + WARM_UP_STEPS:
            wait_for(run.device)
            measured_from = time.monotonic()
        if run.step == first_step + WARM_UP_STEPS + MEASURED_STEPS and settings.checkpoint is None:
            wait_for(run.device)
            left = run.config.steps - run.step
            needed_s = left * (time.monotonic() - measured_from) / MEASURED_STEPS
        if time.monotonic() + needed_s > settings.deadline:
            return "out_of_time"

r"""One training loop for every rule.

A step s of a run with seed r is a pure function of (state, r, s): its batch, its dropout masks and its probes
are drawn from keys that contain r and s (`localgpt_core.seeds`). A run that was stopped and resumed therefore
gives the same curve, to the last bit, as one that was not.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from localgpt_core.batches import windows
from localgpt_core.checkpoints import load_checkpoint
from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.corpus import Corpus
from localgpt_core.run_state import RunState, TrainResult
from localgpt_core.validation import require, require_integer

__all__ = ["Report", "TrainResult", "select_device", "train"]

WARM_UP_STEPS, MEASURED_STEPS = 5, 20

Report = Callable[[dict[str, float]], None]


def select_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: If it is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: allowed are 'cpu', 'cuda' or 'cuda:N'") from None
    require(device.type in ("cpu", "cuda"), "device", name, "allowed are 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        require((device.index or 0) < count, "device", name, f"this machine has {count} CUDA devices")
    return device


def train(
    model_config: LocalGPTConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    *,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    deadline: float = math.inf,
    report: Report | None = None,
    diagnose_every: int = 0,
) -> TrainResult:
    """Train a model and return it with its curves.

    Args:
        model_config: The model and its rule; ``vocab_size`` must be the corpus's.
        train_config: The run.
        corpus: Where the batches and the validation split come from.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        checkpoint: File to write at every evaluation, at the end and when interrupted; None writes none.
        resume: Go on from ``checkpoint`` if it exists.
        deadline: Value of ``time.monotonic()`` by which the run must be over. It is stopped as soon as its
            own speed shows that it cannot be.
        report: Called with ``step`` and whatever was measured there: ``train_loss``, ``val_loss``.
        diagnose_every: Steps between comparisons of the rule with the exact gradient; 0 makes none. The run
            itself is the same to the last bit.

    Raises:
        ValueError: For a corpus that does not fit the model, a device that is not there, or a checkpoint that
            is damaged or of another run.
    """
    device = select_device(str(device))
    allowed = f"must be the {corpus.vocab_size} of corpus {corpus.name!r}"
    require(model_config.vocab_size == corpus.vocab_size, "vocab_size", model_config.vocab_size, allowed)
    require_integer("diagnose_every", diagnose_every, 0)
    windows(corpus.val, model_config.block_size)
    report = report or (lambda measured: None)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        resumes = resume and checkpoint is not None and Path(checkpoint).exists()
        saved = load_checkpoint(checkpoint) if resumes else None
        run = RunState(model_config, train_config, corpus, device, diagnose_every, saved)
        status = _advance_to_the_end(run, checkpoint, deadline, report)
        if checkpoint is not None and status in ("finished", "interrupted"):
            run.save(Path(checkpoint))
    return run.result(status)


@contextmanager
def _interrupt_between_steps() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is cut in half; the second one raises as usual.

    Outside the main thread, where Python allows no signal handlers, the event is never set.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    usual = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


def _advance_to_the_end(run: RunState, checkpoint: str | Path | None, deadline: float, report: Report) -> str:
    """Advance ``run`` until it is over and return the status."""
    first_step, measured_from = run.step, 0.0
    with _interrupt_between_steps() as interrupted:
        while True:
            if run.evaluation_due:
                loss = run.evaluate()
                report({"step": run.step, "val_loss": loss})
                if not math.isfinite(loss):
                    return "diverged"
                if checkpoint is not None and run.step > first_step:
                    run.save(Path(checkpoint))
            if run.diagnosis_due:
                run.diagnose()
            if run.step == run.config.steps:
                return "finished"
            if interrupted.is_set():
                return "interrupted"
            point = run.advance()
            if point is not None:
                report({"step": run.step, "train_loss": point})
                if not math.isfinite(point):
                    return "diverged"
            needed_s = 0.0
            if run.step == first_step + WARM_UP_STEPS:
                measured_from = time.monotonic()
            if run.step == first_step + WARM_UP_STEPS + MEASURED_STEPS:
                left = run.config.steps - run.step
                needed_s = left * (time.monotonic() - measured_from) / MEASURED_STEPS
            if time.monotonic() + needed_s > deadline:
                return "out_of_time"

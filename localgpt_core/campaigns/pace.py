"""How many processes train fastest side by side on one device: measured with a real training, and kept.

Where a step is too small to fill a device, two processes do more together than one. All that are compared
start at once and compile their model once; then one of them takes steps for a while, two together, and so on.
"""

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from localgpt_core.common.files import atomic_write, parse_json, read_regular
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.records.specs import RunSpec
from localgpt_core.training.state import RunState

__all__ = ["Pace", "measured_pace", "read_pace", "steppers"]

MEASURED_S, START_S = 3.0, 240.0  # of steps; at most until a process has compiled its model and is warm
FAREWELL_S = 10.0  # for a process to end by itself
ENDLESS, WARM_UP_STEPS = 10**12, 5
GAIN = 1.05  # one more process at a time must be worth its memory
LARGEST_PACE = 2**16  # bytes


@dataclass(frozen=True)
class Pace:
    """What a device does of the same training: steps per second by the number of processes, and their start.

    Attributes:
        device: Name of the device.
        preset: Preset that was trained.
        steps_per_s: Training steps per second of 1, 2, ... processes together; 0 if that many do not fit.
        start_s: Seconds until a process has taken its first steps.
    """

    device: str
    preset: str
    steps_per_s: tuple[float, ...]
    start_s: float

    @property
    def jobs(self) -> int:
        """The number of processes that are fastest together; of almost equal numbers the smallest."""
        best = 1
        for number, pace in enumerate(self.steps_per_s, start=1):
            best = number if pace > GAIN * self.steps_per_s[best - 1] else best
        return best

    def seconds_per_step(self, jobs: int) -> float:
        """Return the time of a step of one of ``jobs`` processes; infinite if that was not measured."""
        pace = self.steps_per_s[jobs - 1] if jobs <= len(self.steps_per_s) else 0.0
        return jobs / pace if pace else math.inf

    def write(self, path: Path) -> None:
        """Write the pace as JSON, atomically."""
        atomic_write(path, json.dumps(asdict(self)) + "\n")


def read_pace(path: Path, device: str, preset: str) -> Pace | None:
    """Return the pace in a file if it is that of this device and preset, else None."""
    with suppress(OSError, ValueError, TypeError):
        found = Pace(**parse_json(read_regular(path, LARGEST_PACE).decode()))
        kept = replace(found, steps_per_s=tuple(map(float, found.steps_per_s)), start_s=float(found.start_s))
        if (kept.device, kept.preset) == (device, preset) and kept.steps_per_s:
            return kept
    return None


def measured_pace(device: str, preset: str, most: int, steps: Callable[[int], float], start_s: float) -> Pace:
    """Return the pace of 1 to ``most`` processes by ``steps``, their number to steps per second together."""
    paces = [steps(1)]
    while len(paces) < most and paces[-1] > 0:
        paces.append(steps(len(paces) + 1))
    return Pace(device, preset, tuple(paces), start_s)


@contextmanager
def steppers(
    most: int, spec: RunSpec, corpus: Corpus, device: str, threads: int, seconds: float = MEASURED_S
) -> Iterator[Callable[[int], float]]:
    """Start ``most`` processes that train ``spec``, and yield a function: steps per second of n of them.

    All are warm when this returns; those that are not asked wait. Where one of the n has failed, for want of
    memory say, the function returns 0. The processes end with the ``with`` block, and with this process.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    for _ in range(most):
        ours, theirs = context.Pipe()
        work = context.Process(target=_step, args=(theirs, spec, corpus, device, threads))
        work.start()
        theirs.close()
        started.append((work, ours))

    def answered(pipe: Connection, patience_s: float) -> float:
        try:
            return pipe.recv() if pipe.poll(patience_s) else 0.0
        except (EOFError, OSError):
            return 0.0

    def together(number: int) -> float:
        pipes = [pipe for _, pipe in started[:number]]
        if not all(warm[:number]):
            return 0.0
        for pipe in pipes:
            with suppress(OSError):
                pipe.send(seconds)
        paces = [answered(pipe, START_S) for pipe in pipes]
        return sum(paces) if all(paces) else 0.0

    try:
        end = time.monotonic() + START_S
        warm = [answered(pipe, max(0.0, end - time.monotonic())) for _, pipe in started]
        yield together
    finally:
        for _, pipe in started:
            pipe.close()
        end = time.monotonic() + FAREWELL_S
        for work, _ in started:
            work.join(max(0.0, end - time.monotonic()))
            work.kill()
            work.join()


def _step(pipe: Connection, spec: RunSpec, corpus: Corpus, device: str, threads: int) -> None:
    """Train without an end; answer each number of seconds with the steps per second in that time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who has started this process ends it
    torch.set_num_threads(threads)
    with suppress(Exception):  # the end of the pipe says it
        run = RunState(spec.model, replace(spec.train, steps=ENDLESS), corpus, torch.device(device))
        for _ in range(WARM_UP_STEPS):
            run.advance()
        pipe.send(_pace(run, 0.0))
        while True:
            pipe.send(_pace(run, pipe.recv()))


def _pace(run: RunState, seconds: float) -> float:
    """Return the steps per second of ``run`` in the next ``seconds``, of one step at least."""
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < seconds:
        run.advance()
        steps += 1
    run.pending[-1].item()  # waits for the device
    return steps / (time.perf_counter() - start)

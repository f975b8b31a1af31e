"""A suite on Ray: every run is a task, see `localgpt_core.engines.tasks`, here or anywhere in a cluster.

Ray begins a task again whose process or machine is gone. If the machine is gone for Ray alone, its run still
holds the lock: the task that was begun again leaves it alone, and the scheduler waits for it.
"""

import io
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from localgpt_core.common.files import mark
from localgpt_core.common.validation import Refusal, require, require_integer
from localgpt_core.engines.tasks import Job, make
from localgpt_core.experiments.making import RunMaker, Say
from localgpt_core.experiments.scheduler import SuiteRun
from localgpt_core.experiments.suites import PlannedRun
from localgpt_core.records import RunRecord

__all__ = ["RETRIES", "RayRun", "ray_runs"]

RETRIES, STARTS = 10, 3
MOST_RETRIES = 10**6
OBJECTS_BYTES = 128 * 2**20  # for the texts of a suite, on a machine of our own
# Ray asks for all of these in its environment only.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class RayRun:
    """A run that is a task, see `localgpt_core.experiments.making.Begun`."""

    def __init__(self, run: PlannedRun, task: Any, out: Path, say: Say) -> None:
        self.run, self.task, self.out, self.say = run, task, out, say
        self.seconds, self.problem = 0.0, ""
        self._outcome: str | None = None

    def outcome(self) -> str | None:
        """Return what became of the run once its task has ended, None before."""
        import ray

        if self._outcome is None and ray.wait([self.task], timeout=0)[0]:
            self._outcome = self._ended()
        return self._outcome

    def _ended(self) -> str:
        import ray

        try:
            made = ray.get(self.task)
        except ray.exceptions.TaskCancelledError:
            return "interrupted"
        except ray.exceptions.LocalRayletDiedError:
            ray.shutdown()  # without its part on this machine, Ray answers nothing any more
            raise ConnectionError("Ray has ended on this machine; start the suite again to go on") from None
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            self.problem = f"{type(cause).__name__}: {_first_line(cause)}"
            return "failed"
        self.seconds = made.seconds
        if made.record:
            RunRecord.from_json(made.record).write(self.out)
        for text in made.said:
            self.say(text)
        return made.outcome

    def stop(self) -> None:
        """Let the run stop as after Ctrl-C: a task that waits never begins."""
        import ray

        if ray.is_initialized():
            ray.cancel(self.task, force=False)

    def wait(self) -> None:
        """Return when the task has ended, and what it said is said."""
        import ray

        if ray.is_initialized():
            ray.wait([self.task])
            self.outcome()


@contextmanager
def ray_runs(
    suite: SuiteRun,
    say: Say,
    *,
    address: str | None = None,
    jobs: int | None = None,
    device: str = "cpu",
    gpu_share: float = 1.0,
    retries: int = RETRIES,
) -> Iterator[Callable[[PlannedRun, Say], RayRun]]:
    """Yield what begins a run of ``suite`` as a task; SIGTERM is a Ctrl-C inside the ``with`` block.

    Args:
        suite: The suite.
        say: Called with news of the cluster.
        address: A cluster that is there, which goes on afterwards: ``"auto"`` or ``"HOST:PORT"``. None starts
            one on this machine, which ends with the block.
        jobs: How many runs this machine must have room for; None: one for each CPU.
        device: Device of the runs on their machines, ``"cpu"`` or ``"cuda"``.
        gpu_share: Share of a GPU that a run takes on ``"cuda"``.
        retries: How often a run is begun again whose process or machine is gone.

    Raises:
        ValueError: For a share or a number out of its range, or where no cluster answers.
        ModuleNotFoundError: Without Ray.
    """
    require(0 < gpu_share <= 1, "gpu_share", gpu_share, "must be positive and at most 1")
    require_integer("retries", retries, 0, MOST_RETRIES)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    threads = suite.settings.threads or 1
    needs = {"CPU": float(threads), "GPU": gpu_share if device == "cuda" else 0.0}
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        room = max(os.cpu_count() or 1, (jobs or 1) * threads)
        here = {"num_cpus": room, "include_dashboard": False, "object_store_memory": OBJECTS_BYTES}
        options |= here | {"address": "local"}
    with ExitStack() as stack:
        catch = stack.enter_context(sigterm_as_ctrl_c())
        stack.enter_context(redirect_stdout(News(say)))
        stack.callback(ray.shutdown)  # it only takes leave of a cluster that it has not started
        _join(options, say)
        catch()  # once more: Ray has a handler of its own
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0.0) >= own for name, own in needs.items()) for node in nodes):
            asked = " and ".join(f"{own:g} {name}" for name, own in needs.items() if own)
            say(f"no machine of the cluster has {asked} for a run: they wait for one that has")
        remote = ray.remote(max_calls=1)(make).options(
            num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_retries=retries
        )
        own = RunMaker(suite.suite, None, *(path.absolute() for path in (suite.records, suite.out)))
        job = ray.put(
            Job(
                maker=replace(own, preset=suite.preset),
                settings={"device": device, "threads": threads, "accumulate": suite.settings.accumulate},
                until=time.time() + suite.settings.deadline - time.monotonic(),
                mark=stack.enter_context(mark(own.out)),
                command=sys.argv,
                environment={name: said for name, said in os.environ.items() if name.startswith("LOCALGPT_")},
            )
        )
        texts: dict[str, Any] = {}

        def begin(run: PlannedRun, say: Say) -> RayRun:
            sha256 = run.spec.corpus_sha256
            if sha256 not in texts:
                texts[sha256] = ray.put(run.corpus)
            return RayRun(run, remote.remote(job, replace(run, corpus=None), texts[sha256]), suite.out, say)

        yield begin


class News(io.StringIO):
    """In the place of stdout: Ray prints there what happens to machines, with the end of their logs."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say = say

    def write(self, text: str) -> int:
        """Say the first sentence of what Ray prints at once."""
        if sentence := re.split(r"\n|(?<=\.) ", re.sub(r"\x1b\[[\d;]*m", "", text).strip())[0]:
            self.say(f"Ray: {sentence}")
        return len(text)


def _join(options: dict[str, Any], say: Say) -> None:
    """Join a cluster, or start one here: Ray gives up where a machine is too busy to start it at once."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray says no more than that
            if options["address"] != "local":
                address = f"address={options['address']!r}"
                raise Refusal(f"{address}: no cluster answers there ({_first_line(error)})") from None
            if not left:
                raise
            say(f"Ray did not start: {_first_line(error)} Trying again")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[Callable[[], None]]:
    """Let SIGTERM raise as Ctrl-C does inside the ``with`` block, and end the process behind it.

    Yields what installs that again, where somebody else has caught SIGTERM meanwhile.
    """
    came, usual = [], signal.getsignal(signal.SIGTERM)

    def handle(signum: int, frame: object) -> None:
        came.append(signum)
        raise KeyboardInterrupt

    def catch() -> None:
        signal.signal(signal.SIGTERM, handle)

    catch()
    try:
        yield catch
    finally:
        signal.signal(signal.SIGTERM, usual)
        if came:
            os.kill(os.getpid(), signal.SIGTERM)

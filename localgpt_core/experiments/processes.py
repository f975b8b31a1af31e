"""One run in a process of its own: `localgpt run SUITE --only DIGEST`.

Its stdin is a pipe that nothing is written to. When that ends, because whoever started the run lets go of it
or is gone, the run stops as after Ctrl-C: between two steps, with its checkpoint written. So nothing goes on
that nobody waits for. The process has a session of its own: a Ctrl-C in the terminal reaches it once, through
the pipe.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from localgpt_core.experiments.suites import PlannedRun

__all__ = ["STATUSES", "RunProcess"]

# What the process of a run, or of a suite, says by its exit status, see `localgpt_core.cli`.
STATUSES = {"complete": 0, "failed": 1, "out_of_time": 3, "elsewhere": 4, "interrupted": 130}
LAST_WORDS_S = 5.0
OUTCOMES = {status: word for word, status in STATUSES.items()}


class RunProcess:
    """The process that makes ``run``, started with ``options`` of `localgpt run` behind its suite.

    What it says goes to this process's stderr, or line by line to ``hear``.
    """

    def __init__(
        self, run: PlannedRun, suite: str, *options: str, hear: Callable[[str], None] | None = None
    ) -> None:
        self.run, self.started, self.listener = run, time.monotonic(), None
        command = [sys.executable, "-m", "localgpt_core", "run", suite, "--only", run.spec.digest]
        pipes = {"stdin": subprocess.PIPE} | ({} if hear is None else {"stderr": subprocess.PIPE})
        self.process = subprocess.Popen(
            [*command, *options, "--stop-with-stdin"], start_new_session=True, **pipes
        )
        if hear is not None:
            self.listener = threading.Thread(target=self._listen, args=(hear,), daemon=True)
            self.listener.start()

    def _listen(self, hear: Callable[[str], None]) -> None:
        for line in self.process.stderr:
            hear(line.decode(errors="replace").rstrip())

    @property
    def seconds(self) -> float:
        """The time since the process was started."""
        return time.monotonic() - self.started

    def outcome(self) -> str | None:
        """Return one of `STATUSES` once the process has ended, None before; ``"failed"`` for any other."""
        status = self.process.poll()
        if status is None:
            return None
        self.stop()
        self.wait()
        return OUTCOMES.get(status, "failed")

    @property
    def problem(self) -> str:
        """What is to be said of a process that did not end by itself; it has no words of its own."""
        status = self.process.poll()
        return "" if status is None or status >= 0 else f"exit status {status}"

    def stop(self) -> None:
        """Let the run stop as after Ctrl-C."""
        with suppress(OSError):
            self.process.stdin.close()

    def wait(self) -> None:
        """Return when the process has ended, and all that it said is heard."""
        self.process.wait()
        if self.listener is not None:
            self.listener.join(LAST_WORDS_S)

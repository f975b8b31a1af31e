"""What a task of Ray's does: one run.

It does what a process of the local engine does: it takes the lock of the run, goes on from its checkpoint if
there is one, and writes the record. That is so where its machine sees the folder of the new records. Where it
does not, the task works in a folder of its own and returns the record for the one who asked to write; nothing
is lost then but the steps of a run that is begun again. Records could be returned in both cases, but those of
runs that end after the one who asked is gone would be lost.
"""

import os
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localgpt_core.corpus.corpus import Corpus
from localgpt_core.experiments.making import RunMaker
from localgpt_core.experiments.suites import PlannedRun
from localgpt_core.training.settings import RunSettings

__all__ = ["Job", "Made", "make"]


@dataclass(frozen=True)
class Job:
    """What a task is told beside its run.

    Attributes:
        maker: The suite and its folders, without its corpus.
        settings: Fields of `RunSettings`, the device among them: that of the machine of the task.
        until: Seconds since the epoch by which the run must be over.
        mark: A file in the folder of the new records, by which a task knows the folder.
        command: The command line, as a record notes it.
        environment: The package's own variables.
    """

    maker: RunMaker
    settings: dict[str, Any]
    until: float
    mark: Path
    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Made:
    """What a task returns: a word of `SuiteRun.make`, seconds, words, and a record that nobody else sees."""

    outcome: str
    seconds: float
    said: list[str]
    record: str = ""


def make(job: Job, run: PlannedRun, corpus: Corpus) -> Made:
    """Make ``run`` in the process of a task."""
    start, said = time.monotonic(), []
    sys.argv[:] = job.command
    os.environ.update(job.environment)
    settings = RunSettings(**job.settings, deadline=start + job.until - time.time())
    maker = replace(job.maker, corpus=corpus, settings=settings)
    with ExitStack() as stack:
        shared = job.mark.exists()
        if not shared:
            own = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            maker = replace(maker, out=own, records=own)
        with warnings.catch_warnings(record=True) as caught:
            outcome = maker.one(replace(run, corpus=corpus), said.append)
        said += [f"warning: {warning.message}" for warning in caught]
        file = maker.out / f"{run.spec.digest}.json"
        record = "" if shared or not file.exists() else file.read_text(encoding="utf-8")
    return Made(outcome, time.monotonic() - start, said, record)

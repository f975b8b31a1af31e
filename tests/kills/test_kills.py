"""Suites killed at random moments: nothing that finished is lost, nothing is made twice, nothing goes on.

Every case is drawn from its number. LOCALGPT_KILLS=50 kills each victim fifty times, as `make kills` does;
the unit tests kill most of them once.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from toys import PATIENCE_S, short_suite, toy_text

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments.scheduler import SuiteRun
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records

KILLS = int(os.environ.get("LOCALGPT_KILLS", "1"))
ORPHAN_S = 5 if KILLS > 1 else PATIENCE_S  # a bound in seconds is for an idle machine

SAME = ("suite", "arm", "spec", "seed", "status", "curves", "final_val_loss")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of the suite, and what its runs come to when nobody disturbs them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "toy.txt").write_text(toy_text())
    (folder / "suite.toml").write_text(short_suite(folder / "toy.txt", [1, 2]))
    suite = read_suite(folder / "suite.toml")
    records = folder / "records"
    assert SuiteRun(suite, load_corpus(suite.corpus), records, records / "suite").all(1, lambda text: None)
    return folder, outcome(records)


def outcome(records):
    """Return what every run came to, without the times; no file may be refused."""
    found = load_records(records, pytest.fail)
    return {digest: {name: getattr(record, name) for name in SAME} for digest, record in found.items()}


class Killed:
    """One folder of records, worked on by processes that are killed."""

    def __init__(self, suite, folder, source, jobs):
        self.suite, self.folder, self.source, self.jobs = suite, folder, source, jobs
        self.records, self.kept, self.kills = folder / "records", {}, 0
        folder.mkdir()

    def start(self):
        command = [sys.executable, "-m", "localgpt_core", "run", str(self.suite), "--jobs", str(self.jobs)]
        with open(self.folder / "said", "a") as said:
            return psutil.Popen(
                [*command, "--records", str(self.records)],
                stdout=subprocess.DEVNULL,
                stderr=said,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def alive(self):
        """Return the processes that work on these records."""
        found = psutil.process_iter(["cmdline", "status"])
        return [
            process
            for process in found
            if any(str(self.records) in word for word in process.info["cmdline"] or ())
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def kill(self, process, victim):
        """Kill ``victim`` of the suite of ``process``, if it is there; what that leaves behind must end."""
        how = self.source.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            below = [child for child in process.children() if child in self.alive()]
            if victim == "group":
                os.killpg(process.pid, how)
            elif victim == "child":
                # Ctrl-C never reaches a child: it has a session of its own.
                self.source.choice(below or [process]).send_signal(max(how, signal.SIGKILL))
            else:
                process.send_signal(how)
            self.kills += 1
            if victim == "child":
                return
            process.wait(PATIENCE_S)
            deadline = time.monotonic() + ORPHAN_S
            while left := [child for child in below if child in self.alive()]:
                assert time.monotonic() < deadline, left
                time.sleep(0.05)

    def check(self):
        """No record is refused, gone or written again, and nobody reported an error of the program."""
        outcome(self.records)
        found = {path: (path.read_bytes(), path.stat().st_ino) for path in self.records.rglob("*.json")}
        whole = {path: found.get(path) for path in self.kept if b'"sample": ""' not in self.kept[path][0]}
        # A record is written before its sample, and once more with it.
        assert whole.items() <= self.kept.items() and self.kept.keys() <= found.keys()
        self.kept = found
        said = (self.folder / "said").read_text()
        # Ctrl-C within Python's own start, before it looks for the package, is Python's to report.
        said = re.sub(r"Fatal Python error: init_import_site(.|\n)*?\nKeyboardInterrupt\n", "", said)
        assert "Traceback" not in said and "refused" not in said, said
        made = re.findall(r"\[(\w+)\]: finished", said)
        assert len({*made}) == len(made), said

    def finish(self, process):
        """Let the suite end, and the next command find nothing to do and nothing to tidy up."""
        process.wait(PATIENCE_S)
        last = self.start()
        assert last.wait(PATIENCE_S) == 0
        assert self.alive() == []
        self.check()
        leftovers = [p for p in self.records.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]
        assert leftovers == []


# How many runs go side by side, who is killed, how many suites work on the same records.
CASES = [(2, "child", 1), (2, "parent", 1), (1, "parent", 1), (2, "parent", 2)]
MORE = [(1, "group", 1), (2, "group", 1), (1, "parent", 2)]


@pytest.mark.parametrize(("jobs", "victim", "suites"), CASES + MORE if KILLS > 1 else CASES)
def test_kills_at_random_moments_lose_nothing_and_leave_nothing(made, tmp_path, jobs, victim, suites):
    folder, expected = made
    source, kills, number = random.Random(f"{jobs} {victim} {suites}"), 0, 0
    while kills < KILLS:
        number += 1
        killed = Killed(folder / "suite.toml", tmp_path / str(number), source, jobs)
        running = []
        while len(killed.kept) < len(expected) and kills + killed.kills < KILLS:
            running = [process for process in running if process.poll() is None]
            running += [killed.start() for _ in range(suites - len(running))]
            time.sleep(source.uniform(0.0, 6.0))
            killed.kill(source.choice(running), victim)
            killed.check()
        for process in running:
            process.wait(PATIENCE_S)
        kills += killed.kills
        killed.finish(killed.start())
        assert outcome(killed.records) == expected

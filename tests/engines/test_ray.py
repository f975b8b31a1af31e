"""A suite on Ray, on one machine and on a cluster of several nodes on it.

LOCALGPT_KILLS=20 kills twenty processes and nodes, as `make kills` kills fifty; the unit tests kill three.
"""

import gc
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from toys import PATIENCE_S, short_suite, toy_text

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.engines.ray import RayRun, ray_runs
from localgpt_core.engines.tasks import Job, make
from localgpt_core.experiments.making import RunMaker, title_of
from localgpt_core.experiments.scheduler import SuiteRun
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records
from localgpt_core.training.checkpoints import load_checkpoint

KILLS = int(os.environ.get("LOCALGPT_KILLS", "3"))
LONG = "[arms.long]\ntrain = { steps = 1000000 }\nseeds = [1]\n"
OBJECTS = 80 * 2**20
STARTED = []
SAME = ("suite", "arm", "preset", "spec", "seed", "status", "curves", "final_val_loss", "best_val_loss")
NO_WAITING = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


def outcome(records):
    """Return what every run came to, without the times; no file may be refused."""
    found = load_records(records, pytest.fail)
    return {digest: {name: getattr(record, name) for name in SAME} for digest, record in found.items()}


class Plan:
    """A suite, and what its runs come to by the local engine; long.toml has one more, without an end."""

    def __init__(self, folder, seeds):
        self.folder, self.path = folder, folder / "suite.toml"
        (folder / "toy.txt").write_text(toy_text())
        self.path.write_text(short_suite(folder / "toy.txt", seeds))
        (folder / "long.toml").write_text(self.path.read_text() + LONG)
        suite = read_suite(self.path)
        corpus = load_corpus(suite.corpus)
        (self.endless,) = (
            run.spec.digest for run in read_suite(folder / "long.toml").plan(corpus) if run.arm.name == "long"
        )
        run = SuiteRun(suite, corpus, folder / "local", folder / "local" / "suite")
        assert run.all(1, lambda text: None)
        self.local = outcome(folder / "local")

    def start(self, records, *more, suite="suite.toml", engine="ray"):
        """Start `localgpt run` in a process group of its own, which does not outlive the test."""
        command = [sys.executable, "-m", "localgpt_core", "run", str(self.folder / suite), "--engine", engine]
        self.said_in = self.folder / f"said {len(STARTED)} {records.name}"
        with open(self.said_in, "w") as said:
            process = subprocess.Popen(
                [*command, "--records", str(records), *more],
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=environment(),
                start_new_session=True,
            )
        STARTED.append(process)
        return process

    @property
    def said(self):
        return self.said_in.read_text()


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    while STARTED:
        process = STARTED.pop()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def environment():
    """Return the variables of this process, with the package where the workers of Ray find it too."""
    path = [os.path.join(os.path.dirname(__file__), "without"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cluster(monkeypatch):
    """Return a cluster of a head without CPUs, which `join` adds nodes to."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": OBJECTS, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={**head, "_system_config": NO_WAITING})
    yield made
    made.shutdown()
    del made
    gc.collect()


def join(cluster):
    """Return a new node of one CPU; who joins the cluster on this machine still joins its head."""
    address = Path(cluster.head_node.get_session_dir_path(), "node_ip_address.json")
    before = address.read_bytes() if address.exists() else None
    node = cluster.add_node(num_cpus=1, object_store_memory=OBJECTS, node_ip_address="127.0.0.1")
    if before is not None:
        address.write_bytes(before)
    return node


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return Plan(tmp_path_factory.mktemp("plan"), [1, 2])


def wait_until(condition, process):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)


def records_in(folder):
    return [path for path in folder.rglob("*.json") if not path.name.startswith(".")]


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.needs("ray")
def test_records_are_those_of_the_local_engine_to_the_last_bit(plan, tmp_path):
    process = plan.start(tmp_path)
    assert process.communicate(timeout=PATIENCE_S)[0] == "suite: complete\n", plan.said
    assert process.returncode == 0 and outcome(tmp_path) == plan.local and leftovers(tmp_path) == []
    for digest, record in load_records(tmp_path).items():
        local = load_records(plan.folder / "local")[digest]
        assert record.sample == local.sample and record.environment == local.environment
        assert re.match(r"python -m localgpt_core run suite.toml --engine ray ", record.provenance["command"])
        assert len(re.findall(rf"\[{digest}\]: finished, \d\.\d+ nats", plan.said)) == 1
    assert "Traceback" not in plan.said and "warning" not in plan.said.lower()


@pytest.mark.needs("ray")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_suite_that_is_stopped_leaves_whole_files_and_nothing_that_goes_on(plan, tmp_path, how):
    process = plan.start(tmp_path, suite="long.toml")
    wait_until(lambda: list(tmp_path.rglob(f"{plan.endless}.safetensors")), process)
    below = psutil.Process(process.pid).children(recursive=True)
    if how == signal.SIGKILL:  # other processes of Ray's take a minute to find out that they are alone
        below = [child for child in below if "ray::make" in child.cmdline()[0]]
    assert below
    process.send_signal(how)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == (130 if how == signal.SIGINT else -how) and out == ""
    _, alive = psutil.wait_procs(below, timeout=PATIENCE_S)
    assert alive == [] and "Traceback" not in plan.said
    outcome(tmp_path)  # every file can be read
    if how != signal.SIGKILL:
        assert re.search(r"\]: interrupted after \d+ steps, no record yet; the next time", plan.said)
    (checkpoint,) = tmp_path.rglob(f"{plan.endless}.safetensors")
    step = load_checkpoint(checkpoint).progress["step"]
    process = plan.start(
        tmp_path, "--only", plan.endless, "--time-budget", "1", suite="long.toml", engine="local"
    )
    process.communicate(timeout=PATIENCE_S)
    assert f"goes on from step {step}/" in plan.said


def at_work(nodes):
    """Return the processes of tasks that make a run on ``nodes``."""
    found = []
    for node in nodes:
        (raylet,) = node.all_processes["raylet"]
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(raylet.process.pid).children(recursive=True)
    with_names = []
    for process in found:
        with suppress(psutil.NoSuchProcess):
            with_names += [process] if "ray::make" in " ".join(process.cmdline()) else []
    return with_names


@pytest.mark.needs("ray")
def test_a_suite_whose_own_ray_has_ended_says_so_and_ends(plan, tmp_path):
    process = plan.start(tmp_path, suite="long.toml")
    wait_until(lambda: list(tmp_path.rglob("*.safetensors")), process)
    (raylet,) = (child for child in psutil.Process(process.pid).children() if child.name() == "raylet")
    raylet.kill()
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (1, "")
    # Some versions of Ray end this process before it can say so.
    assert "Ray has ended on this machine; start the suite again" in plan.said or "raylet" in plan.said


def wait_for_an_evaluation(records, process):
    began = time.time()
    while process.poll() is None:
        with suppress(FileNotFoundError):
            if any(file.stat().st_mtime > began for file in records.rglob("*.safetensors")):
                return
        time.sleep(0.02)


@pytest.mark.needs("ray")
@pytest.mark.filterwarnings(
    "ignore:unclosed file <_io.* name='/dev/null':ResourceWarning"
)  # of Ray's Cluster
def test_kills_of_processes_and_nodes_lose_nothing(cluster, tmp_path):
    plan = Plan(tmp_path, [1, 2, 3, 4, 5, 6] if KILLS > 3 else [1, 2])
    nodes = [join(cluster), join(cluster)]
    source, kills = random.Random(1), []
    while len(kills) < KILLS:
        records, kept = tmp_path / f"records {len(kills)}", {}
        process = plan.start(records, "--address", cluster.address)
        while process.poll() is None and len(kills) < KILLS:
            time.sleep(source.uniform(0.0, 6.0))
            if source.random() < 0.7:  # else most of them would hit a process that only starts
                wait_for_an_evaluation(records, process)
            if len(kills) % 4 == 0 and at_work(nodes):
                cluster.remove_node(nodes.pop(source.randrange(len(nodes))), allow_graceful=False)
                nodes.append(join(cluster))
                kills.append("node")
            elif tasks := at_work(nodes):
                with suppress(psutil.NoSuchProcess):
                    source.choice(tasks).kill()
                    kills.append("process")
            now = {file: (file.read_bytes(), file.stat().st_ino) for file in records_in(records)}
            whole = {file: now.get(file) for file in kept if b'"sample": ""' not in kept[file][0]}
            assert whole.items() <= kept.items() and kept.keys() <= now.keys()  # none is gone or made again
            kept = now
        out, _ = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out) == (0, "suite: complete\n"), plan.said
        assert outcome(records) == plan.local and leftovers(records) == []
        made = re.findall(r"\[(\w+)\]: finished", plan.said)
        assert len({*made}) == len(made) and "Traceback" not in plan.said
        assert "Ray: (raylet) " in plan.said and "\x1b" not in plan.said
        print(f"{kills.count('process')} processes and {kills.count('node')} nodes were killed")
    process = plan.start(tmp_path / "again", "--address", cluster.address, "--only", next(iter(plan.local)))
    assert process.communicate(timeout=PATIENCE_S)[0] == "" and process.returncode == 0  # it is still there


# Without Ray


@pytest.fixture
def maker(plan, tmp_path):
    suite = read_suite(plan.path)
    return RunMaker(suite, load_corpus(suite.corpus), tmp_path / "records", tmp_path / "records" / "suite")


def job(maker, mark):
    settings = {"device": "cpu", "threads": 1, "accumulate": 1}
    own = replace(maker, corpus=None)
    return Job(own, settings, time.time() + 1000, mark, ["localgpt", "run"], {"LOCALGPT_NEWS": "yes"})


def test_a_task_that_does_not_see_the_folder_returns_the_record(plan, maker, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["worker.py"])
    monkeypatch.setenv("LOCALGPT_NEWS", "no")
    run, other, *_ = maker.planned().values()
    maker.out.mkdir(parents=True)
    (maker.out / "mark").touch()
    seen = make(job(maker, maker.out / "mark"), replace(run, corpus=None), maker.corpus)
    assert (seen.outcome, seen.record) == ("complete", "") and outcome(maker.records).keys() == {
        run.spec.digest
    }
    assert sys.argv == ["localgpt", "run"] and os.environ["LOCALGPT_NEWS"] == "yes"
    far = make(job(maker, maker.out / "nothing"), replace(other, corpus=None), maker.corpus)
    assert far.outcome == "complete" and outcome(maker.records).keys() == {run.spec.digest}
    assert far.said[-1].startswith(f"{title_of(other)}: finished, ")
    fake = types.ModuleType("ray")
    fake.wait, fake.get = lambda tasks, timeout=None: (tasks, []), lambda task: task
    monkeypatch.setitem(sys.modules, "ray", fake)
    said = []
    begun = RayRun(other, far, maker.out, said.append)
    assert begun.outcome() == "complete" and begun.outcome() == "complete" and begun.problem == ""
    assert said == far.said and begun.seconds == far.seconds
    expected = {digest: plan.local[digest] for digest in (run.spec.digest, other.spec.digest)}
    assert outcome(maker.records) == expected


def test_the_time_of_a_suite_ends_for_a_task_too(maker):
    run = next(iter(maker.planned().values()))
    over = replace(job(maker, maker.out / "nothing"), until=time.time() - 1)
    assert make(over, replace(run, corpus=None), maker.corpus).outcome == "out_of_time"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_share": 0.0}, "gpu_share=0.0: "),
        ({"gpu_share": 1.5}, "gpu_share=1.5: "),
        ({"retries": -1}, "retries=-1: "),
    ],
)
def test_numbers_out_of_range_are_refused_before_ray_is_asked_for(maker, options, message):
    with pytest.raises(ValueError, match=message), ray_runs(maker, print, **options):
        pass

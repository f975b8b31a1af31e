"""What runs elsewhere: workflows, hooks, Binder. Their files are read, and what they call is there."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read(path):
    # "on" is a truth value in YAML 1.1
    return {"on" if key is True else key: value for key, value in yaml.safe_load(path.read_text()).items()}


def steps(path):
    return [(job, step) for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_is_there_and_may_do_no_more_than_it_needs(path):
    workflow = read(path)
    assert workflow["permissions"]["contents"] == "read"
    assert {"write"} & {*map(str, workflow["permissions"].values())} == (
        {"write"} if path.stem == "links" else set()
    )
    for job, step in steps(path):
        assert job["runs-on"] == "ubuntu-latest" and ("timeout-minutes" in job or "environment" in job)
        if "run" in step:
            match step["run"].split():
                case ["bash", script]:
                    assert (ROOT / script).is_file()
                case ["make", *targets]:
                    assert {*targets} <= TARGETS
                case other:
                    pytest.fail(f"{other}")
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_every_workflow_is_known_to_the_tests():
    assert [path.stem for path in WORKFLOWS] == ["book", "ci", "links"]


def test_a_tag_publishes_and_a_pull_request_does_not():
    workflow = read(ROOT / ".github/workflows/book.yml")
    assert workflow["on"]["push"] == {"tags": ["v*"]} and "pull_request" in workflow["on"]
    publish = workflow["jobs"]["publish"]
    assert publish["if"] == "github.event_name == 'push'"
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}


def test_the_pythons_are_those_that_the_package_names():
    used = {
        step["with"]["python-version"]
        for path in WORKFLOWS
        for _, step in steps(path)
        if "python" in str(step)
    }
    assert used == {"3.11", "3.12"}


def test_hooks_run_what_lint_runs():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = {hook["id"]: hook["entry"] for hook in repository["hooks"]}
    assert entries["ruff-check"].startswith(".venv/bin/ruff check")
    assert entries["ruff-format"].startswith(".venv/bin/ruff format")
    assert (ROOT / entries["executed"].split()[-1]).is_file()


def test_binder_installs_the_package_with_what_the_chapters_need():
    needs = read(ROOT / "binder/environment.yml")["dependencies"]
    (pip,) = [need["pip"] for need in needs if isinstance(need, dict)]
    assert pip == ["-e ..[book]"] and "pytorch-cpu=2.*" in needs


def test_the_citation_names_the_version_of_the_package():
    citation, project = read(ROOT / "CITATION.cff"), (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project and citation["license"] == "MIT"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_chapters_are_written_and_compared_with_the_same_kernels():
    text = (ROOT / "Makefile").read_text()
    targets = "run-chapters check-chapters execute"
    names = re.findall(rf"^{targets}: export (\w+) := \w+$", text, re.MULTILINE)
    assert names == ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"]
    assert set(targets.split()) <= TARGETS

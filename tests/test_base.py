"""What a machine without the extras skips, by name and only where it is told to."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = {
    "test_file": "import nothing_at_all\n\ndef test_a():\n    pass",
    "test_own": "import localgpt_core.nothing_at_all",
    "test_each": """
import pytest

def test_import():
    import nothing_at_all.inside

def test_own_import():
    import torch.nothing_at_all

@pytest.mark.needs("nothing_at_all")
def test_at_second_hand():
    assert False

@pytest.mark.needs("torch")
def test_that_is_there():
    pass

def test_fails():
    assert "" == "ModuleNotFoundError: No module named 'nothing_at_all'"
""",
}
WITHOUT = {
    "base": "failed=2 passed=1 skipped=3 error=1",  # test_own_import, test_fails; the rest of test_own
    "": "failed=4 passed=1 error=2",
}


@pytest.mark.parametrize("mode", WITHOUT)
def test_what_needs_an_extra_is_skipped_by_name_where_that_is_asked_for(mode, tmp_path):
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = needs(package): as in pyproject.toml\n")
    for name, code in TESTS.items():
        (tmp_path / f"{name}.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
    environment = {**os.environ, "LOCALGPT_TESTS": mode}
    command += ["--continue-on-collection-errors", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    *_, last = done.stdout.strip().splitlines()
    found = {kind: number for number, kind in re.findall(r"(\d+) (failed|passed|skipped|error)", last)}
    assert " ".join(f"{kind}={number}" for kind, number in found.items()) == WITHOUT[mode], done.stdout
    assert done.stdout.count("needs nothing_at_all") == (3 if mode else 0)


def test_what_no_machine_goes_without_is_what_the_package_declares():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    own = re.search(r'^OWN = "(.*?)"', CONFTEST.read_text(), re.MULTILINE)[1]
    assert {*own.split("|")} == {"localgpt_core", *declared}

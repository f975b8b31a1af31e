"""What every test shares: one thread, a fixed seed, repeatable examples, and what a test may go without.

With ``LOCALGPT_TESTS=base`` in the environment, for a machine that has the package's own dependencies and
none of its extras (`.ci/run-training-path`), what needs a package that is not there is skipped by its name: a
file or a test that imports it, and a test with the marker ``needs``. Without it, all of these fail.
"""

import os
import re
import signal
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# A job that a shell put into the background ignores Ctrl-C, and so would everything that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write tests/training/golden/*.json anew instead of comparing with them (see test_golden.py)",
    )


def pytest_configure(config):
    # Torch's own, at the first use of forward-mode derivatives in a process.
    config.addinivalue_line(
        "filterwarnings", "ignore:.torch.jit.script. is (deprecated|not):DeprecationWarning"
    )


BASE = os.environ.get("LOCALGPT_TESTS") == "base"
OWN = "localgpt_core|filelock|numpy|rich|safetensors|torch|tqdm|typer"  # what no machine goes without
MISSING = re.compile(rf"E +ModuleNotFoundError: No module named '(?!(?:{OWN})\b)(\w+)[\w.]*'\s*\Z")


def _without(report, error):
    """Make of a failure for want of a package a skip that names it, where that is allowed."""
    found = MISSING.search(error) if BASE and report.failed else None
    if found:
        report.outcome = "skipped"
        report.longrepr = (report.nodeid.partition("::")[0], 0, f"Skipped: needs {found[1]}")
    return report


def pytest_collection_modifyitems(items):
    for item in items if BASE else ():
        for package in (name for marker in item.iter_markers("needs") for name in marker.args):
            if find_spec(package) is None:
                item.add_marker(pytest.mark.skip(reason=f"needs {package}"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    return _without(report, str(report.longrepr))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call):
    return _without((yield), f"E {call.excinfo.exconly()}" if call.excinfo else "")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

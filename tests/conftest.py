"""What every test shares: one thread, a fixed seed, repeatable examples."""

import signal

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


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

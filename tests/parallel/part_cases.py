"""Tiny runs, in float64, of every rule and every option that has something to share; and two processes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from toys import toy_corpus, toy_model, toy_train

from localgpt_core import RULES, train
from localgpt_core.parallel import Group
from localgpt_core.training import Report, TrainResult

TOLERANCE, STATES = 1e-12, 1e-9  # relative: of losses, and of what the run ends with

# With as many probes as inputs the feedback would be the weight.
KACZMARZ = {"method": "kp", "fa_grape": True, "fa_grape_update": "kaczmarz", "fa_grape_n_probe": 3}

# The changes to the model and to the run.
CASES: dict[str, tuple[dict, dict]] = {name: ({"method": name}, {}) for name in RULES} | {
    "fa-grape": ({"method": "fa", "fa_grape": True, "fa_grape_start": 1}, {}),
    "kp-kaczmarz": (
        {"method": "kp", "fa_grape": True, "fa_grape_update": "kaczmarz", "fa_grape_n_probe": 3},
        {},
    ),
    "dfa-grape": ({"method": "dfa", "fa_grape": True, "fa_grape_start": 1}, {}),
    # Of the four sequences one, of which most parts have none.
    "dfa-fdfa": ({"method": "dfa", "fa_grape": True, "jvp_update": "fdfa", "jvp_share": 0.25}, {}),
    "dkp-block": ({"method": "dkp", "dfa_granularity": "block", "dfa_norm": True}, {}),
    "kmeans": ({"method": "fa", "vq_codes": 5, "vq_init": "kmeans"}, {"vq_start": 2}),
    "anchors": ({"method": "dkp"}, {"anchor_interval": 2}),
    "anchors-only": ({"method": "dkp"}, {"anchor_interval": 2, "anchor_only": True}),
    "noise": ({"method": "fa"}, {"noise_start": 2}),
    "dropout": ({"method": "dfa", "dropout": 0.3, "fa_grape": True}, {}),
    "dropout-softmax": ({"method": "fa", "dropout": 0.3, "attn_mode": "softmax"}, {"grad_clip": 0.0}),
}

RUN = {"steps": 5, "batch_size": 4, "precision": "float64", "eval_interval": 3, "lr": 0.01, "warmup": 2}


def made(model: dict, run: dict, **settings) -> TrainResult:
    """Return a run of ``model`` and ``run``, changes to the toys."""
    return train(toy_model(**{"n_layer": 2} | model), toy_train(**RUN | run), toy_corpus(), **settings)


def losses(result: TrainResult) -> torch.Tensor:
    """Return the loss of every step and of every evaluation."""
    assert result.status == "finished"
    return torch.tensor(result.curves["train_loss"] + result.curves["val_loss"], dtype=torch.float64)


def difference(first: TrainResult, second: TrainResult) -> float:
    """Return the largest relative difference of two runs' losses."""
    a, b = losses(first), losses(second)
    return float(((a - b) / a).abs().max())


def assert_same(first: TrainResult, second: TrainResult) -> None:
    """Assert that two runs are one: their losses, FLOPs, weights and feedback."""
    assert difference(first, second) <= TOLERANCE
    assert first.flops_per_token == second.flops_per_token
    states = first.model.state_dict(), second.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        # Where a gradient is next to nothing, AdamW makes a step of any size of its rounding.
        assert (states[1][name] - tensor).norm() <= STATES * tensor.norm(), name


def stopping_at(step: int) -> Report:
    """Return what presses Ctrl-C when the training loss of ``step`` is reported, and says nothing."""

    def report(measured: dict[str, float]) -> None:
        if measured["step"] == step and "train_loss" in measured:
            signal.raise_signal(signal.SIGINT)

    return report


FOLLOW = """if True:
    from localgpt_core.parallel import launched
    from localgpt_core.training import follow
    follow(launched())"""


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def two_processes(code: str = FOLLOW) -> Iterator[tuple[Group, subprocess.Popen]]:
    """Yield the group that this process leads, and the other process, which runs ``code``."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    follower = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **where, "RANK": "1", "LOCAL_RANK": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**where, "RANK": "0", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        group = Group()
    try:
        yield group, follower
    finally:
        group.leave()
        follower.kill()
        follower.communicate()

"""The curves of a run: at which steps they have points, what a point is, and what they cannot be."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from localgpt_core.common.validation import require, require_integer
from localgpt_core.config import TrainConfig
from localgpt_core.config.schedule import learning_rate

__all__ = [
    "ACCURACY",
    "KEPT",
    "Curves",
    "add_point",
    "as_the_last",
    "check_curves",
    "check_increasing",
    "curve_interval",
    "no_points",
]

CURVE_POINTS = 100
NAMES = ("step", "tokens", "lr", "train_loss", "val_step", "val_loss")
ACCURACY = "val_accuracy"  # a curve of runs on answers
KEPT = 2e-5  # relative: two numbers that keep 6 digits each, and their quotient

Curves = dict[str, list[float]]


def no_points(answers: bool) -> Curves:
    """Return the curves of a run that has measured nothing yet, on a corpus with ``answers`` or without."""
    return {name: [] for name in (*NAMES, *[ACCURACY] * answers)}


def curve_interval(steps: int) -> int:
    """Return every how many steps a run of ``steps`` steps has a point of its training curve."""
    return max(1, steps // CURVE_POINTS)


def add_point(curves: Curves, step: int, losses: Tensor, config: TrainConfig, block_size: int) -> float:
    """Add the point of ``step``, the mean of the training losses since the last one, and return that mean."""
    curves["step"].append(step)
    curves["tokens"].append(step * config.batch_size * block_size)
    curves["lr"].append(learning_rate(step - 1, config))
    curves["train_loss"].append(losses.mean().item())
    return curves["train_loss"][-1]


def as_the_last(curves: Curves, config: TrainConfig) -> dict[int, float]:
    """Return the validation losses, by step, of the evaluations that are as the last one is.

    Only these compare: one on a part of the split can be lower than one on all of it, with the same weights.
    """
    measured = zip(curves["val_step"], curves["val_loss"], strict=True)
    return {step: loss for step, loss in measured if config.eval_batches(step) == config.eval_iters}


def check_curves(curves: Any, block_size: int, train: TrainConfig, done: int) -> None:
    """Raise ``ValueError`` unless ``curves`` can be those of a run that has taken at most ``done`` steps.

    All but the losses are functions of the configuration: with s_i the steps, B the batch size and T the
    context, tokens_i = s_i B T, lr_i is the schedule's, and evaluations are at every ``eval_interval`` steps
    and at the last one. A run on answers has ``val_accuracy`` too, a share at each evaluation.
    """
    names = [*map(str, curves)] if isinstance(curves, dict) else curves
    complete = isinstance(curves, dict) and {*names} - {ACCURACY} == {*NAMES}
    require(complete, "curves", names, f"must be {', '.join(NAMES)}")
    for name, curve in curves.items():
        numbers = isinstance(curve, list) and all(isinstance(x, int | float | None) for x in curve)
        require(numbers, "curves", name, "must be a list of numbers")
    steps, evaluated = curves["step"], curves["val_step"]
    pairs = [("tokens", "step"), ("lr", "step"), ("train_loss", "step"), ("val_loss", "val_step")]
    for name, of in pairs + [(ACCURACY, "val_step")] * (ACCURACY in curves):
        found, wanted = len(curves[name]), len(curves[of])
        require(found == wanted, f"curves.{name}", curves[name], f"{found} values for {wanted} steps")
    check_increasing("curves.step", steps, 1, done)
    tokens = [step * train.batch_size * block_size for step in steps]
    require(curves["tokens"] == tokens, "curves.tokens", curves["tokens"], f"of these steps it is {tokens!r}")
    grid = [s for s in range(done + 1) if s % train.eval_interval == 0 or s == train.steps]
    own = grid[: len(evaluated)]
    require(evaluated == own, "curves.val_step", evaluated, f"of its spec it is {own!r}")
    for step, rate in zip(steps, curves["lr"], strict=True):
        wanted = learning_rate(step - 1, train)
        same = rate is not None and math.isclose(rate, wanted, rel_tol=KEPT, abs_tol=1e-9 * train.lr)
        require(same, "curves.lr", rate, f"at step {step} its spec has {wanted:.6g}")

    for accuracy in curves.get(ACCURACY, ()):
        share = accuracy is not None and 0 <= accuracy <= 1
        require(share, f"curves.{ACCURACY}", accuracy, "must be from 0 to 1")


def check_increasing(name: str, steps: Sequence[Any], first: int, last: int) -> None:
    """Raise ``ValueError`` unless ``steps`` are increasing integers from ``first`` to ``last``."""
    for before, step in zip([first - 1, *steps], steps, strict=False):
        require_integer(name, step, before + 1, last)

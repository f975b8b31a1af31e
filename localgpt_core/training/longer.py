"""A finished run as the beginning of a longer one, where the schedule of the learning rate allows it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from localgpt_core.common.validation import require
from localgpt_core.measure.diagnostics import Diagnostics
from localgpt_core.training.checkpoints import Checkpoint
from localgpt_core.training.curves import add_point, curve_interval
from localgpt_core.training.step import learning_rate

__all__ = ["lengthened"]


def lengthened(finished: Checkpoint, steps: int, path: Path) -> Checkpoint:
    """Return the checkpoint that a run of ``steps`` steps leaves at ``path`` where ``finished`` ended.

    What goes on from it gives the same run, to the last bit, as one that had ``steps`` steps from the start.

    Raises:
        ValueError: If ``steps`` are not more, or the learning rates of both runs differ before that place.
    """
    old = finished.train_config
    new = replace(old, steps=steps)
    done, progress = finished.progress["step"], dict(finished.progress)
    require(steps > done, "steps", steps, f"must be more than the {done} of {finished.path}")
    last, other = (learning_rate(done - 1, config) for config in (old, new))
    allowed = f"cannot go on from {finished.path}, whose learning rate has fallen to {last:.2g} where"
    allowed += f" that of {steps} steps is {other:.2g}; a run with min_lr_ratio=1 can be made longer"
    same = all(learning_rate(step, old) == learning_rate(step, new) for step in range(done))
    require(same, "steps", steps, allowed)
    losses = torch.tensor([*progress["losses"], *progress["pending"]], dtype=torch.float64)
    allowed = f"cannot go on from {finished.path}, which does not hold the loss of every step"
    require(len(losses) == done, "steps", steps, allowed)

    between, block_size = curve_interval(steps), finished.model_config.block_size
    curves = {**progress["curves"], "step": [], "tokens": [], "lr": [], "train_loss": []}
    points = range(between, done + 1, between)
    for step in points:
        add_point(curves, step, losses[step - between : step], new, block_size)
    if done % old.eval_interval:
        curves |= {key: curves[key][:-1] for key in ("val_step", "val_loss")}
    if "step" in progress["diagnostics"]:
        progress["diagnostics"] = _at_regular_steps(progress["diagnostics"])
    kept = len(points) * between
    progress |= {"curves": curves, "losses": losses[:kept].tolist(), "pending": losses[kept:].tolist()}
    return replace(finished, path=path, train_config=new, progress=progress)


def _at_regular_steps(diagnostics: Diagnostics) -> Diagnostics:
    """Return ``diagnostics`` without those of the run's end, if that came before the next were due."""
    gaps = [after - before for before, after in pairwise(diagnostics["step"])]
    if len({*gaps}) <= 1:
        return diagnostics
    return {
        name: {place: own[:-1] for place, own in values.items()} if isinstance(values, dict) else values[:-1]
        for name, values in diagnostics.items()
    }

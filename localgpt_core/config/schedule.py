r"""What a step of a run is by its number: its learning rate, an anchor or not, taken or skipped.

The rate has a linear warm-up and a cosine decay, with m = ``min_lr_ratio``:

    lr(s) = lr (s + 1) / (warmup + 1)                                                  for s < warmup
            lr (m + (1 - m) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2)         after it
"""

import math

from localgpt_core.config.run import TrainConfig

__all__ = ["anchors_in", "is_anchor", "is_skipped", "learning_rate", "steps_taken"]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of ``step``, counted from 0: linear warm-up, then cosine decay."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def is_anchor(step: int, config: TrainConfig) -> bool:
    """Return whether ``step``, counted from 0, is an anchor: every ``anchor_interval``-th step is."""
    return config.anchor_interval > 0 and (step + 1) % config.anchor_interval == 0


def is_skipped(step: int, config: TrainConfig) -> bool:
    """Return whether ``step``, counted from 0, moves nothing: with ``anchor_only`` all but the anchors."""
    return config.anchor_only and not is_anchor(step, config)


def anchors_in(steps: int, config: TrainConfig) -> int:
    """Return how many of the first ``steps`` steps are anchors."""
    return steps // config.anchor_interval if config.anchor_interval else 0


def steps_taken(steps: int, config: TrainConfig) -> int:
    """Return how many of the first ``steps`` steps the optimiser takes: all that are not skipped."""
    return anchors_in(steps, config) if config.anchor_only else steps

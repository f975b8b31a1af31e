"""The training curve of a run: at which steps it has points, and what a point is."""

from torch import Tensor

from localgpt_core.config import TrainConfig
from localgpt_core.training.step import learning_rate

__all__ = ["Curves", "add_point", "curve_interval"]

CURVE_POINTS = 100

Curves = dict[str, list[float]]


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

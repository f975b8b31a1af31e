"""One run.

Where and how it goes, one step and one evaluation for every rule, the state between two steps, its curves,
the loop, and checkpoints from which a run goes on bit for bit, held to their run before they are used.
What comes out is a `TrainResult`; its record is made in `localgpt_core.experiments`.
"""

from localgpt_core.config.schedule import is_anchor, learning_rate
from localgpt_core.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from localgpt_core.training.loop import follow, train
from localgpt_core.training.settings import Report, RunSettings, select_device
from localgpt_core.training.state import RunState, TrainResult
from localgpt_core.training.step import (
    build_model,
    build_optimizer,
    evaluate,
    training_step,
)

__all__ = [
    "Checkpoint",
    "Report",
    "RunSettings",
    "RunState",
    "TrainResult",
    "build_model",
    "build_optimizer",
    "evaluate",
    "follow",
    "is_anchor",
    "learning_rate",
    "load_checkpoint",
    "save_checkpoint",
    "select_device",
    "train",
    "training_step",
]

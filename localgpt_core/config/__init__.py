"""What can be asked for.

The fields of a model and of a run, each with its effect and its limits, what the two do not allow together,
and the presets. A value that cannot work is refused here, before anything is computed. Every field changes
the result; where and how a run goes is in `localgpt_core.training.settings`.
"""

from localgpt_core.config.model import LocalGPTConfig
from localgpt_core.config.presets import DEVICES, PRESETS, build, preset
from localgpt_core.config.run import CODEBOOK_BATCHES, TrainConfig, check_run

__all__ = [
    "CODEBOOK_BATCHES",
    "DEVICES",
    "LocalGPTConfig",
    "PRESETS",
    "TrainConfig",
    "build",
    "check_run",
    "preset",
]

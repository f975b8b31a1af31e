"""What a training step costs: matrix-multiplication FLOPs, and the memory it takes."""

import copy
import resource
import sys

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from localgpt_core.model import LocalGPT

__all__ = ["peak_memory_mib", "step_flops"]


def step_flops(model: LocalGPT, idx: Tensor, targets: Tensor) -> int:
    """Return the matmul FLOPs of one training step: alignment of the feedback, forward and backward pass.

    Counted by ``torch.utils.flop_counter`` (a multiply-add is 2 FLOPs) on a copy: ``model`` is untouched.
    """
    model = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter:
        model.align_feedback("flops")
        model(idx, targets)[1].backward()
    return counter.get_total_flops()


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: allocated on a GPU, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

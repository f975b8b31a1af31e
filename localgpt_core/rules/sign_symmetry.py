"""Sign symmetry: one bit of every weight, ``grad_input = grad_output @ (s sign(W))``.

``s`` is one constant per layer, the mean magnitude of its weights at the start, so that no magnitude is
transported during training. Source: Liao, Leibo and Poggio 2016; at scale Xiao et al. 2018.
"""

import torch
from torch import Tensor

from localgpt_core.rules.base import LearningRule

__all__ = ["SignSymmetry"]


class SignSymmetry(LearningRule):
    """``grad_input = grad_output @ (s sign(W))`` with the scalar ``s`` in the buffer ``feedback_scale``."""

    transports = "sign"
    buffer_name = "feedback_scale"

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``s = mean |W|`` as a scalar."""
        return weight.detach().abs().mean()

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``s sign(W)`` (out x in), from the weight as it is during the backward pass."""
        return torch.sign(weight) * buffer.to(weight.dtype)

"""Direct feedback alignment: the output's error reaches every layer, ``grad_input = e @ B``.

``e = dloss/dlogits`` has shape (..., V) and ``B`` is (V x in). The backward pass through the weight is not
computed at all, so nothing of it can be transported. At the output layer the output's error *is* the local
error. Source: Nokland 2016.
"""

import torch
from torch import Tensor

from localgpt_core.rules.base import LearningRule
from localgpt_core.rules.feedback_init import initial_feedback

__all__ = ["DirectFeedbackAlignment"]


class DirectFeedbackAlignment(LearningRule):
    """``grad_input = e @ B`` with ``B`` (V x in) in the buffer ``feedback_weight``."""

    error = "output"
    buffer_name = "feedback_weight"
    uses = frozenset({"fa_init_mode", "fa_sparse_k", "feedback_std", "feedback_seed"})

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``B`` at its start; ``error_features`` is the width V of the network's output."""
        return initial_feedback(self.options, error_features, weight, generator)

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``B``."""
        return buffer

r"""Kolen-Pollack: the feedback takes the same steps as the weight, ``grad_input = grad_output @ B``.

The gradient g^T x of the weight is local to the layer: whoever keeps B has both factors too. If W and B take
the same increments and decay alike,

    W <- (1 - lr wd) W - lr u,    B <- (1 - lr wd) B - lr u,    u the optimiser's direction for g^T x,

then W - B <- (1 - lr wd) (W - B): the difference vanishes although neither ever reads the other. Here the
optimiser holds B beside W and is handed the same gradient for both, so that u is the same to the last bit.
Source: Kolen and Pollack 1994; Akrout et al. 2019.
"""

import torch
from torch import Tensor

from localgpt_core.rules.base import START_OPTIONS, LearningRule
from localgpt_core.rules.feedback_init import initial_feedback

__all__ = ["KolenPollack"]


class KolenPollack(LearningRule):
    """``grad_input = grad_output @ B``, ``B`` (out x in) moving by the same increments as the weight."""

    buffer_name = "feedback_weight"
    mirrors_gradient = True
    uses = START_OPTIONS

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``B`` at its start."""
        return initial_feedback(self.options, error_features, weight, generator)

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``B``."""
        return buffer

"""Backpropagation: the feedback is the weight itself, ``grad_input = grad_output @ W``.

This is weight transport: the backward pass needs every number of the forward weight (Grossberg 1987,
Crick 1989). Source: Rumelhart, Hinton and Williams 1986.
"""

from torch import Tensor

from localgpt_core.rules.base import LearningRule

__all__ = ["Backprop"]


class Backprop(LearningRule):
    """``grad_input = grad_output @ W``."""

    transports = "weight"
    is_derivative = True

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return the weight (out x in)."""
        return weight

"""Sign symmetry: one bit of every weight, ``grad_input = grad_output @ (s sign(W))``.

``s`` are magnitudes that are chosen at the start and stay, so that no magnitude is transported during
training: ``uniform``, one constant per layer, the mean magnitude of its weights, or ``random``, one per
weight, the magnitudes of Gaussian numbers with that mean. Source: Liao, Leibo and Poggio 2016; at scale Xiao
et al. 2018. BioTorch (Sanfiz and Akrout 2021) calls the two uSF and frSF.
"""

import math

import torch
from torch import Tensor

from localgpt_core.rules.base import LearningRule

__all__ = ["SignSymmetry"]


class SignSymmetry(LearningRule):
    """``grad_input = grad_output @ (s sign(W))``, ``s`` a scalar or (out x in) in ``feedback_scale``."""

    transports = "sign"
    buffer_name = "feedback_scale"
    uses = frozenset({"sign_magnitude", "feedback_seed"})

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``s``: the mean of ``|W|``, or random magnitudes of that mean."""
        mean = weight.detach().abs().mean()
        if self.options.sign_magnitude == "uniform":
            return mean
        normal = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device="cpu")
        return normal.abs().to(weight) * (mean * math.sqrt(math.pi / 2))

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``s sign(W)`` (out x in), from the weight as it is during the backward pass."""
        return torch.sign(weight) * buffer.to(weight.dtype)

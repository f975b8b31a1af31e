r"""Direct feedback alignment: the output's error reaches every layer, ``grad_input = e @ B``.

``e = dloss/dlogits`` has shape (..., V) and ``B`` is (V x in). The backward pass through the weight is not
computed at all, so nothing of it can be transported. At the output layer the output's error *is* the local
error. Source: Nokland 2016.

With ``fa_grape`` the matrix follows the network's Jacobian J = dlogits/dx at its own place. One forward-mode
pass in which every layer's input is perturbed by its own noise p gives

    J_hat = mean over tokens of (J p) p^T                     (V x in),   E[J_hat] = J,

where the noise of all other layers and tokens is independent of p and averages out. Then, by ``jvp_update``,

    grape   b <- |b| unit(unit(b) + rate (unit(j) - cos(b, j) unit(b)))     for each column b of B, j of J_hat
    fdfa    B <- (1 - rate) B + rate J_hat

The first is one gradient step on 1 - cos with the columns' norms fixed (Caillon et al. 2026, who fix them at
1; here they keep the norm they start with, feedback_std sqrt(V) on average). J_hat is averaged over tokens
before the cosine: that of a single token has rank 1 and parallel columns. The second is FDFA (Bacho and Chu
2022), a running mean.
"""

import torch
from torch import Tensor
from torch.nn import functional

from localgpt_core.common.modes import in_float32
from localgpt_core.matrices.initial import initial_feedback
from localgpt_core.rules.base import JVP_OPTIONS, START_OPTIONS, LearningRule

__all__ = ["DirectFeedbackAlignment"]


class DirectFeedbackAlignment(LearningRule):
    """``grad_input = e @ B`` with ``B`` (V x in) in the buffer ``feedback_weight``."""

    error = "output"
    buffer_name = "feedback_weight"
    uses = START_OPTIONS | JVP_OPTIONS | {"fa_grape", "fa_grape_head", "fa_grape_start"}

    @property
    def aligns(self) -> str:
        """``"network"`` with ``fa_grape``."""
        return "network" if self.options.fa_grape else "no"

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``B`` at its start; ``error_features`` is the width V of the network's output."""
        return initial_feedback(self.options, error_features, weight, generator)

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``B``."""
        return buffer

    @torch.no_grad()
    @in_float32
    def align_to_jacobian(self, buffer: Tensor, estimate: Tensor) -> None:
        """Move ``B`` by one step on an estimate of the Jacobian, by ``jvp_update``."""
        rate = self.options.jvp_rate
        if self.options.jvp_update == "fdfa":
            buffer.lerp_(estimate.to(buffer.dtype), rate)
            return
        norm = buffer.norm(dim=0, keepdim=True)
        old = functional.normalize(buffer, dim=0)
        new = functional.normalize(estimate.to(buffer.dtype), dim=0)
        cosine = (old * new).sum(dim=0, keepdim=True)
        buffer.copy_(norm * functional.normalize(old + rate * (new - cosine * old), dim=0))

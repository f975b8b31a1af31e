r"""Weight mirror: the feedback learns its weight from noise, ``grad_input = grad_output @ B``.

In a phase of its own the layer's input is white noise xi ~ N(0, I_in) and its answer is y = xi W^T. The
correlation of the two is the weight, E[y^T xi] = W, so that the Hebbian update with decay

    B <- (1 - rate) B + rate (1/n) sum over n inputs of y^T xi

settles at W, with fluctuations: one update carries the noise of n samples, in all in + 1 over n in squared
norm relative to W, and the running mean leaves rate / (2 - rate) of it. Akrout et al. 2019 have a gain and a
decay; here both are ``mirror_rate``, which makes the fixed point W itself. One such phase runs before every
training step.
"""

import torch
from torch import Tensor

from localgpt_core.common.modes import in_float32
from localgpt_core.matrices.initial import initial_feedback
from localgpt_core.rules.base import START_OPTIONS, LearningRule

__all__ = ["WeightMirror"]


class WeightMirror(LearningRule):
    """``grad_input = grad_output @ B``, ``B`` (out x in) a running mean of ``y^T xi`` for white noise."""

    buffer_name = "feedback_weight"
    uses = START_OPTIONS | {"mirror_n_probe", "mirror_rate"}

    @property
    def aligns(self) -> str:
        """``"layer"``: one mirror phase per training step."""
        return "layer"

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``B`` at its start."""
        return initial_feedback(self.options, error_features, weight, generator)

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``B``."""
        return buffer

    @torch.no_grad()
    @in_float32
    def align(
        self, weight: Tensor, buffer: Tensor | None, is_output: bool, generator: torch.Generator
    ) -> None:
        """Present white noise once and move ``B`` by its correlation with the answer."""
        n, rate = self.options.mirror_n_probe, self.options.mirror_rate
        shape = (n, weight.shape[1])
        noise = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
        answer = noise @ weight.T
        torch.addmm(buffer, answer.T, noise, beta=1 - rate, alpha=rate / n, out=buffer)

    def align_flops(self, out_features: int, in_features: int, is_output: bool) -> int:
        """Return those of two products: the noise through ``W``, and the answer with the noise."""
        return 2 * 2 * self.options.mirror_n_probe * out_features * in_features

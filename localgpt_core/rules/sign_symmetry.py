"""Sign symmetry: one bit of every weight, ``grad_input = grad_output @ (s sign(W))``.

``s`` are magnitudes that are chosen at the start: ``uniform``, one constant per layer, the mean magnitude of
its weights, or ``random``, one per weight, the magnitudes of Gaussian numbers with that mean. They stay, so
that no magnitude is transported during training, unless ``scale_follows`` says that before every step

    s <- s mean|W| / mean(s),

where mean|W| is read, one number per layer, or estimated by forward probes, so that nothing but signs is: see
`localgpt_core.matrices.scale`. Source: Liao, Leibo and Poggio 2016; at scale Xiao et al. 2018 and Moskovitz,
Litwin-Kumar and Abbott 2018. BioTorch (Sanfiz and Akrout 2021) calls the two uSF and frSF.
"""

import math

import torch
from torch import Tensor

from localgpt_core.matrices.scale import follow_magnitude
from localgpt_core.rules.base import SCALE_OPTIONS, LearningRule

__all__ = ["SignSymmetry"]


class SignSymmetry(LearningRule):
    """``grad_input = grad_output @ (s sign(W))``, ``s`` a scalar or (out x in) in ``feedback_scale``."""

    transports = "sign"
    buffer_name = "feedback_scale"
    uses = frozenset({"sign_magnitude", "feedback_seed"}) | SCALE_OPTIONS

    @property
    def aligns(self) -> str:
        """``"layer"`` where the magnitudes follow those of the weight."""
        return "no" if self.options.scale_follows == "start" else "layer"

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``s``: the mean of ``|W|``, or random magnitudes of that mean."""
        mean = weight.detach().abs().mean()
        if self.options.scale_follows != "start":
            # A weight of zeros has no signs either: any size will do until it has, and 0 could never follow.
            mean = torch.where(mean > 0, mean, 1.0)
        if self.options.sign_magnitude == "uniform":
            return mean
        normal = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device="cpu")
        return normal.abs().to(weight) * (mean * math.sqrt(math.pi / 2))

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``s sign(W)`` (out x in), from the weight as it is during the backward pass."""
        return torch.sign(weight) * buffer.to(weight.dtype)

    def align(
        self, weight: Tensor, buffer: Tensor | None, is_output: bool, generator: torch.Generator
    ) -> None:
        """Scale ``s`` to the mean magnitude of ``W``, or to its estimate by fresh forward probes."""
        follow_magnitude(weight, buffer, self.options.scale_probes, generator)

    def align_flops(self, out_features: int, in_features: int, is_output: bool) -> int:
        """Return those of two products: probes, if there are any, through ``W`` and through its signs."""
        return 2 * 2 * self.options.scale_probes * out_features * in_features

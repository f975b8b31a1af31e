"""Feedback alignment: a fixed random matrix replaces the weight, ``grad_input = grad_output @ B``.

Source: Lillicrap, Cownden, Tweed and Akerman 2016. With ``fa_grape`` the matrix does not stay fixed: forward
probes turn it towards the weight once per training step, see `localgpt_core.matrices.grape`. With
``scale_follows`` its direction stays, and its norm is the weight's before every step,

    B <- B |W|_F / |B|_F,

where |W|_F is read, or estimated by forward probes: see `localgpt_core.matrices.scale`.
"""

import torch
from torch import Tensor

from localgpt_core.matrices.grape import align_to_weight, project_to_weight
from localgpt_core.matrices.initial import initial_feedback
from localgpt_core.matrices.scale import follow_norm
from localgpt_core.rules.base import PROBE_OPTIONS, SCALE_OPTIONS, START_OPTIONS, LearningRule

__all__ = ["FeedbackAlignment"]


class FeedbackAlignment(LearningRule):
    """``grad_input = grad_output @ B`` with ``B`` (out x in) in the buffer ``feedback_weight``."""

    buffer_name = "feedback_weight"
    uses = START_OPTIONS | PROBE_OPTIONS | SCALE_OPTIONS | {"fa_grape", "fa_grape_head", "fa_grape_start"}

    @property
    def aligns(self) -> str:
        """``"layer"`` with ``fa_grape``, or where the norm follows the weight's."""
        return "layer" if self.options.fa_grape or self._scales else "no"

    @property
    def _scales(self) -> bool:
        return self.options.scale_follows != "start"

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``B`` at its start; ``error_features`` is ``out_features`` for a local error."""
        return initial_feedback(self.options, error_features, weight, generator)

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``B``."""
        return buffer

    def align(
        self, weight: Tensor, buffer: Tensor | None, is_output: bool, generator: torch.Generator
    ) -> None:
        """Turn ``B`` towards ``W`` by one step on fresh forward probes, or give it the norm of ``W``."""
        if self._scales:
            follow_norm(weight, buffer, self.options.scale_probes, generator)
        elif self.options.fa_grape_head or not is_output:
            update = {"cosine": align_to_weight, "kaczmarz": project_to_weight}[self.options.fa_grape_update]
            update(weight, buffer, self.options.fa_grape_n_probe, self.options.fa_grape_lr, generator)

    def align_flops(self, out_features: int, in_features: int, is_output: bool) -> int:
        """Return those of three products: probes through ``W`` and through ``B``, and what they show.

        For the norm alone, probes go through ``W``, if any do.
        """
        if self._scales:
            return 2 * self.options.scale_probes * out_features * in_features
        if is_output and not self.options.fa_grape_head:
            return 0
        n = self.options.fa_grape_n_probe
        # A Kaczmarz step draws no more probes than the input has dimensions.
        n = min(n, in_features) if self.options.fa_grape_update == "kaczmarz" else n
        return 3 * 2 * n * out_features * in_features

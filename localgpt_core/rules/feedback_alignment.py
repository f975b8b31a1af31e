"""Feedback alignment: a fixed random matrix replaces the weight, ``grad_input = grad_output @ B``.

Source: Lillicrap, Cownden, Tweed and Akerman 2016. With ``fa_grape`` the matrix does not stay fixed: forward
probes turn it towards the weight once per training step, see `localgpt_core.rules.grape`.
"""

import torch
from torch import Tensor

from localgpt_core.rules.base import LearningRule
from localgpt_core.rules.feedback_init import initial_feedback
from localgpt_core.rules.grape import align_to_weight

__all__ = ["FeedbackAlignment"]


class FeedbackAlignment(LearningRule):
    """``grad_input = grad_output @ B`` with ``B`` (out x in) in the buffer ``feedback_weight``."""

    buffer_name = "feedback_weight"
    uses = frozenset(
        {
            "fa_init_mode",
            "fa_sparse_k",
            "feedback_std",
            "feedback_seed",
            "fa_grape",
            "fa_grape_n_probe",
            "fa_grape_lr",
            "fa_grape_head",
        }
    )

    @property
    def aligns(self) -> bool:
        """Whether the feedback follows the weight: with ``fa_grape``."""
        return self.options.fa_grape

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return ``B`` at its start; ``error_features`` is ``out_features`` for a local error."""
        return initial_feedback(self.options, error_features, weight, generator)

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return ``B``."""
        return buffer

    def align(
        self, weight: Tensor, buffer: Tensor | None, is_output: bool, generator: torch.Generator
    ) -> None:
        """With ``fa_grape``, turn ``B`` towards ``W`` by one step on fresh forward probes."""
        if self.options.fa_grape_head or not is_output:
            align_to_weight(
                weight, buffer, self.options.fa_grape_n_probe, self.options.fa_grape_lr, generator
            )

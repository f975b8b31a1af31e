"""What every module with a feedback matrix has in common, and how a measurement disturbs its input."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from localgpt_core.exact import MaybeExact
from localgpt_core.rules import LearningRule, RuleOptions
from localgpt_core.seeds import generator

__all__ = ["HoldsFeedback", "Perturbation", "feedback_drawn_later"]

_drawn_later = ContextVar("_drawn_later", default=False)


class Perturbation(list):
    """Takes the place of the list of taps in a forward pass that measures what a small change would do.

    Every place with a feedback matrix asks it to disturb its input.
    """

    def perturb(self, place: nn.Module, x: Tensor) -> Tensor:
        """Return ``x``, disturbed, as the input of ``place``."""
        raise NotImplementedError


@contextmanager
def feedback_drawn_later() -> Iterator[None]:
    """Leave out the feedback of every module built inside the ``with`` block.

    For whoever draws it by `HoldsFeedback.reset_feedback` afterwards: an orthogonal matrix takes its time.
    """
    token = _drawn_later.set(True)
    try:
        yield
    finally:
        _drawn_later.reset(token)


class HoldsFeedback(MaybeExact):
    """A module with a learning rule and the one buffer in which that rule keeps its feedback.

    Attributes:
        rule: The `LearningRule`.
        is_output: Whether the module's output is the network's output.
        tap_features: Width V of the taps, None where the rule uses the local error.
    """

    rule: LearningRule
    is_output: bool
    tap_features: int | None

    def _register_feedback(self, options: RuleOptions) -> None:
        if self.rule.buffer_name is not None:
            self.register_buffer(self.rule.buffer_name, None)
            seed = options.feedback_seed
            # Also where the feedback is drawn later: the random state afterwards is the same.
            key = int(torch.randint(2**62, ())) if seed is None else seed
            if not _drawn_later.get():
                self.reset_feedback(key)

    def _weight(self) -> Tensor:
        """Return the weight (out x in) that the feedback belongs to."""
        raise NotImplementedError

    @property
    def buffer(self) -> Tensor | None:
        """The rule's buffer: its feedback matrix or scale; None if the rule has none."""
        return None if self.rule.buffer_name is None else getattr(self, self.rule.buffer_name)

    def reset_feedback(self, *key: int | str) -> None:
        """Draw the feedback anew: a pure function of ``key``, the shape and, for a scale, the weight."""
        if self.rule.buffer_name is not None:
            weight = self._weight()
            width = self.tap_features or len(weight)
            setattr(self, self.rule.buffer_name, self.rule.initial_buffer(weight, width, generator(*key)))

    def align_feedback(self, *key: int | str) -> None:
        """Let a rule that aligns layer by layer move its feedback; random draws depend on ``key`` only."""
        if self.rule.aligns == "layer":
            weight = self._weight()
            self.rule.align(weight, self.buffer, self.is_output, generator(*key, device=weight.device))

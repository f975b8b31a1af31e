"""What every module with a feedback matrix has in common."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from localgpt_core.common.modes import MaybeExact
from localgpt_core.common.seeds import generator
from localgpt_core.rules.base import LearningRule, RuleOptions

__all__ = ["HoldsFeedback", "feedback_drawn_later"]

_drawn_later = ContextVar("_drawn_later", default=False)


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
        matrix: The weight (out x in) that the feedback stands in for; None where there is none.
        place: Its own part of every key that its random draws come from, and its name in messages.
        probed: Whether a measurement runs the module, whose passes are no training then.
        before_step: Entries of weight and feedback before a step that is to move both, or None.
        seen_moving: Which weight and feedback have been seen to move together, or None.
    """

    rule: LearningRule
    is_output: bool
    tap_features: int | None
    matrix: Tensor | None = None
    place: int | str = 0
    probed: bool = False
    before_step: tuple[Tensor, Tensor] | None = None
    seen_moving: tuple[int, int] | None = None

    def _register_feedback(self, options: RuleOptions) -> None:
        if self.rule.buffer_name is not None:
            self.register_buffer(self.rule.buffer_name, None)
            seed = options.feedback_seed
            # Also where the feedback is drawn later: the random state afterwards is the same.
            key = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
            if not _drawn_later.get():
                self.reset_feedback(key)

    @property
    def feedback_like(self) -> Tensor:
        """A tensor (..., in) whose width, dtype and device the feedback shares: the weight, where one is."""
        raise NotImplementedError(f"{type(self).__name__} must say what its feedback is like")

    @property
    def learns(self) -> bool:
        """Whether the feedback has a gradient of its own, from the output's error: e^T x."""
        return self.rule.mirrors_gradient and self.tap_features is not None

    @property
    def buffer(self) -> Tensor | None:
        """The rule's buffer: its feedback matrix or scale; None if the rule has none."""
        buffer = None if self.rule.buffer_name is None else getattr(self, self.rule.buffer_name)
        # Asked here, as whoever loads a state may put another tensor in its place.
        if buffer is not None and self.learns and not buffer.requires_grad:
            buffer.requires_grad_(True)
        return buffer

    def reset_feedback(self, *key: int | str) -> None:
        """Draw the feedback anew: a pure function of ``key``, the shape and, for a scale, the weight."""
        if self.rule.buffer_name is not None:
            like = self.feedback_like
            width = self.tap_features or len(like)
            self._keep(self.rule.initial_buffer(like, width, generator(*key)))

    def _keep(self, new: Tensor) -> None:
        """Let the buffer have the value of ``new``, as the same tensor: an optimiser may hold it."""
        old, new = self.buffer, new.detach()
        if old is None or not torch._has_compatible_shallow_copy_type(old, new):
            setattr(self, self.rule.buffer_name, new)
        elif old is not new:
            old.data = new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HoldsFeedback":
        """Move or cast the module; like a parameter, the feedback stays the tensor that it is."""
        old = self.buffer
        super()._apply(fn, recurse)
        if old is not None:
            new, grad = self.buffer, old.grad
            setattr(self, self.rule.buffer_name, old)
            old.grad = None
            self._keep(new)
            if grad is not None:
                self.buffer.grad = fn(grad)
        return self

    def align_feedback(self, *key: int | str) -> None:
        """Let a rule that aligns layer by layer move its feedback; random draws depend on ``key`` only."""
        if self.rule.aligns == "layer":
            source = generator(*key, device=self.matrix.device)
            self.rule.align(self.matrix, self.buffer, self.is_output, source)

    def disturbed(self, x: Tensor, disturb: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the input ``x`` with ``disturb`` applied to what the feedback answers for: here x itself."""
        return disturb(x)

r"""A feedback point: direct feedback between blocks instead of at every linear layer.

    forward    y      = x                                     (..., C)
    backward   grad_x = e @ B                                 (..., V) @ (V, C)
    with norm  grad_x = (v - mean v - z mean(v z)) / sigma    v = e @ B, z the normalised x
               grad_B = e^T @ x, with norm e^T @ z            (V, ...) @ (..., C), if B is trained

What lies between two such points is trained by its own exact backward pass, started with grad_x. This is the
macro and micro form of Launay et al. 2020, whose blocks end with a LayerNorm: the error entered them through
its derivative. In a stream that is normalised only inside the blocks, nothing else keeps e @ B from having a
component along x, which lets the stream grow without end although the loss does not depend on its length.
``norm`` puts that derivative, and nothing of the forward pass, at the point. It needs no weight and nothing
but the token's own values.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import recorded
from localgpt_core.common.validation import require, require_integer
from localgpt_core.layers.linear import as_rows, missing_error
from localgpt_core.layers.norms import EPS, normalise
from localgpt_core.rules import RULES, LearningRule, RuleOptions
from localgpt_core.rules.direct_feedback_alignment import DirectFeedbackAlignment
from localgpt_core.rules.feedback import HoldsFeedback

__all__ = ["FeedbackPoint", "ReadingPoint"]


class _FeedbackPointFunction(LocalFunction):
    """``apply(x, entry, buffer, rule, tap_features, place) -> (x, tap)``; the tap's error enters at entry.

    Without an entry it enters at x. One tensor given as both would break the graph of torch.compile.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        entry: Tensor | None,
        buffer: Tensor,
        rule: LearningRule,
        tap_features: int,
        place: int | str,
    ) -> tuple[Tensor, Tensor]:
        ctx.rule, ctx.place, ctx.at_x = rule, place, entry is None
        ctx.save_for_backward(buffer, (x if entry is None else entry) if rule.mirrors_gradient else None)
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.new_zeros(()).expand(*x.shape[:-1], tap_features)

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, tap_error: Tensor | None) -> tuple[Tensor | None, ...]:
        if tap_error is None:
            raise missing_error(ctx.place)
        buffer, entered = ctx.saved_tensors
        grad_buffer = None
        if entered is not None:
            grad_buffer = (as_rows(tap_error).T @ as_rows(entered).to(tap_error.dtype)).to(buffer.dtype)
        grad_entry = ctx.rule.signal(tap_error) @ ctx.rule.feedback(None, buffer).to(tap_error.dtype)
        return *((grad_entry, None) if ctx.at_x else (None, grad_entry)), grad_buffer, None, None, None


class FeedbackPoint(HoldsFeedback, nn.Module):
    """A place in the residual stream where the output's error comes in: what arrives from above is dropped.

    Args:
        width: Width C of the stream.
        error_features: Width V of the network's output.
        options: A rule that uses the output's error, and its feedback.
        norm: Whether the error passes the derivative of a LayerNorm on its way in.

    Raises:
        ValueError: For a rule with a local error, or one that reads a layer's weight or aligns to it.
    """

    is_output = False

    def __init__(self, width: int, error_features: int, options: RuleOptions, norm: bool = False) -> None:
        super().__init__()
        require_integer("width", width, 1)
        require_integer("error_features", error_features, 1)
        self.rule = RULES[options.method](options)
        direct = self.rule.error == "output" and self.rule.transports == "nothing"
        allowed = "must be a rule that uses the output's error, and neither reads nor aligns to a weight"
        require(direct and self.rule.aligns != "layer", "method", options.method, allowed)
        self.width, self.tap_features, self.norm = width, error_features, norm
        self.register_buffer("_like", torch.empty(0, width), persistent=False)
        self._register_feedback(options)

    @property
    def feedback_like(self) -> Tensor:
        """An empty tensor of the stream's width: a point has no weight."""
        return self._like

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        """Return ``x`` (..., C); a tap (..., V) is appended to ``taps``, for `publish_error`."""
        if self.exact or not torch.is_grad_enabled() or recorded(self, "layer", self.place):
            return x
        entry = functional.layer_norm(x, (self.width,), eps=EPS) if self.norm else None
        matrix = self.buffer if self.matrix is None else self.matrix
        y, tap = _FeedbackPointFunction.apply(x, entry, matrix, self.rule, self.tap_features, self.place)
        taps.append(tap)
        return y

    def disturbed(self, x: Tensor, disturb: Callable[[Tensor], Tensor]) -> Tensor:
        """Disturb z instead of x where the error comes in behind a norm: dz = dx / sigma."""
        if not self.norm:
            return disturb(x)
        inverse_sigma = normalise(x.detach())[1].to(x.dtype)
        return disturb(x * inverse_sigma) / inverse_sigma

    def extra_repr(self) -> str:
        """Return what ``print(point)`` shows: the width and the rule."""
        return f"{self.width}, method={self.rule.options.method!r}, norm={self.norm}"


class _Read(DirectFeedbackAlignment):
    """``grad_input = e @ M``, the matrix M (V x C) read elsewhere: weight transport."""

    transports = "weight"
    buffer_name = None

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return what was read."""
        return buffer if weight is None else weight


class ReadingPoint(FeedbackPoint):
    """A control: a feedback point whose B is read from weights above it in every forward pass.

    Attributes:
        source: Returns B (V x C); whoever builds the network sets it.
    """

    source: Callable[[], Tensor]

    def _register_feedback(self, options: RuleOptions) -> None:
        self.rule = _Read(options)
        del self._like

    @property
    def matrix(self) -> Tensor:
        """What is read."""
        return self.source().detach()

    @property
    def feedback_like(self) -> Tensor:
        """What is read."""
        return self.matrix

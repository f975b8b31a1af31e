r"""LocalLinear: a linear layer that chooses how it learns, and the one autograd Function behind it.

Shapes: x (..., in), W (out x in), y = x W^T + b (..., out), feedback F (error_features x in).

    forward    y           = x @ W^T + b                     (N, in) @ (in, out)
    backward   grad_weight = grad_output^T @ x               (out, N) @ (N, in)
               grad_bias   = sum over N of grad_output
               grad_input  = error @ F                       (N, error_features) @ (error_features, in)
               grad_F      = error^T @ x                     if F is trained by the output's error

What error and F are, and how much of the error is sent, is up to the rule (`localgpt_core.rules`). One that
does not read the weight in the backward pass has it neither saved nor multiplied by.

**How the output's error reaches a layer.** A layer whose rule uses it returns, beside y, a *tap*: a tensor of
zeros of shape (..., V) that takes no memory (stride 0). `publish_error` joins the taps to the logits. Its
backward hands the gradient of the logits, the error e, to every tap, and to each token where the output pools
several. Autograd delivers it to the layers, which turn it into e @ F when their own turn comes. No hooks, no
global state, no second backward pass; checkpointing and torch.compile see an ordinary graph.

The rejected alternative adds sum(x * (e @ F)) with its value cancelled to the loss: it needs e in closed form
and keeps every e @ F alive at once. A test proves the two equal.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.common.functions import TransformableFunction
from localgpt_core.common.modes import as_autocast, has_tangent, recorded
from localgpt_core.common.validation import require, require_integer
from localgpt_core.rules import RULES, LearningRule, RuleOptions
from localgpt_core.rules.feedback import HoldsFeedback

__all__ = ["LocalLayer", "LocalLinear", "LocalLinearFunction", "publish_error"]


def missing_error(place: int | str) -> RuntimeError:
    """Return the error for a place whose tap the output's error did not reach."""
    return RuntimeError(
        f"layer {place!r}: no error of the network's output reached it. What it computes must go into that "
        "output (publish_error), in the same forward pass and before the layer is called again; a second "
        "head, a replaced output layer and torch.utils.checkpoint with use_reentrant=True cut it off"
    )


def as_rows(x: Tensor | None) -> Tensor | None:
    """Return x (..., n) as a matrix of rows of width n."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def own(y: Tensor) -> Tensor:
    """Return y = x W^T + b, which is a view, as none: that of a Function may not be changed in place."""
    return torch.ops.aten._unsafe_view(y, y.shape)


def tap_of(x: Tensor, features: int) -> Tensor:
    """Return zeros (..., features) for x (..., in) that take no memory."""
    return x.new_zeros(()).expand(*x.shape[:-1], features)


class LocalLinearFunction(TransformableFunction):
    """``apply(x, weight, bias, buffer, rule, tap_features, place) -> (y, tap)``; no tap for a local error.

    Shapes: x (..., in), y (..., out), tap (..., tap_features). ``place`` names the layer in messages.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        buffer: Tensor | None,
        rule: LearningRule,
        tap_features: int | None,
        place: int | str,
    ) -> tuple[Tensor, Tensor | None]:
        """Return y, and a tap if ``tap_features`` is given."""
        y = functional.linear(x, weight) if bias is None else own(functional.linear(x, weight, bias))
        return y, None if tap_features is None else tap_of(x, tap_features)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        """Keep the input, the feedback and, for a rule that reads it, the weight."""
        x, weight, _, buffer, ctx.rule, tap_features, ctx.place = inputs
        ctx.has_tap = tap_features is not None
        ctx.save_for_backward(x, None if ctx.rule.transports == "nothing" else weight, buffer)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, tap_error: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, weight, bias, buffer)."""
        (x, weight, buffer), rule = ctx.saved_tensors, ctx.rule
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        rows, error = as_rows(grad_output), as_rows(tap_error if ctx.has_tap else grad_output)
        of_buffer = ctx.has_tap and rule.mirrors_gradient
        if error is None and (of_input or of_buffer):
            raise missing_error(ctx.place)
        if of_input:
            grad_input = (rule.signal(error) @ rule.feedback(weight, buffer).to(error.dtype)).view(x.shape)
        grad_buffer = (error.T @ as_rows(x)).to(buffer.dtype) if of_buffer else None
        if rows is not None:
            grad_weight = rows.T @ as_rows(x) if of_weight else None
            grad_bias = rows.sum(dim=0) if of_bias else None
        return grad_input, grad_weight, grad_bias, grad_buffer, None, None, None


class _PublishError(TransformableFunction):
    """A copy of the logits whose backward gives their gradient to every tap as well.

    A copy, so that whoever changes the logits in place changes nothing that another node has kept.
    """

    @staticmethod
    def forward(logits: Tensor, *taps: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.pooled = [tap.shape if tap.ndim > output.ndim else None for tap in inputs[1:]]

    @staticmethod
    def backward(ctx, error: Tensor) -> tuple[Tensor, ...]:
        return error, *[error if shape is None else _at_all(error, shape) for shape in ctx.pooled]


def _at_all(error: Tensor, shape: torch.Size) -> Tensor:
    """Return the error (..., V) of each sample at all of its tokens, ``shape`` (..., T, V)."""
    return error[(..., *[None] * (len(shape) - error.ndim), slice(None))].expand(shape)


def publish_error(logits: Tensor, taps: list[Tensor]) -> Tensor:
    """Return ``logits`` unchanged; in the backward pass their gradient e also reaches every tap.

    ``logits`` has shape (..., V), and so has each tap that `LocalLinear` left in ``taps``. A tap may have
    further tokens, (..., T, V): each token t gets e itself, grad_tap[..., t, :] = e, and not a T-th of it.

    Raises:
        ValueError: If the shape of a tap is not that of the logits, further tokens left out.
    """
    for tap in taps:
        fits = tap.shape[:-1][: logits.ndim - 1] + tap.shape[-1:] == logits.shape
        allowed = f"must be {tuple(logits.shape)}, or have further tokens before the last dimension"
        require(fits, "tap.shape", tuple(tap.shape), allowed)
    return _PublishError.apply(logits, *taps) if taps else logits


class LocalLayer(HoldsFeedback):
    """A mixin for a layer ``y = x W^T + b`` whose backward pass follows a learning rule, however it keeps W.

    The module has ``weight``, ``bias``, ``in_features`` and ``out_features``.
    """

    def _take_rule(self, options: RuleOptions, is_output: bool, error_features: int | None) -> None:
        self.rule = RULES[options.method](options)
        self.is_output = is_output
        uses_output_error = self.rule.error == "output" and not is_output
        allowed = f"method={options.method!r} needs the width of the network's output, or is_output=True"
        known = error_features is not None or not uses_output_error
        require(known, "error_features", error_features, allowed)
        self.tap_features = error_features if uses_output_error else None

    def oriented(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, of the shape of the weight, as a matrix (out x in)."""
        return tensor

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix (out x in), however the layer keeps it."""
        return self.oriented(self.weight)

    @property
    def operand(self) -> Tensor:
        """The weight as the forward pass takes it."""
        return self.matrix

    @property
    def feedback_like(self) -> Tensor:
        """The weight as a matrix."""
        return self.matrix

    def forward(self, x: Tensor, taps: list[Tensor] | None = None) -> Tensor:
        """Return y (..., out) for x (..., in).

        Under a rule that uses the output's error, a tap (..., error_features) is appended to ``taps``: give
        it to `publish_error` together with the network's output.

        Raises:
            ValueError: If the rule needs ``taps`` and there are none; if the layer is traced or exported in
                training mode; if forward mode asks for a derivative that the rule does not have.
        """
        weight, bias = self.operand, self.bias
        if not self.follows_rule(x, weight):
            return self.plain(x, weight, bias)
        if self.tap_features is not None:
            require(taps is not None, "taps", taps, "needs a list: this rule uses the output's error")
        y, tap = self.ruled(*as_autocast(x, weight, bias))
        if tap is not None:
            taps.append(tap)
        return y

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y by torch's own operation."""
        return functional.linear(x, weight, bias)

    def ruled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return y, whose backward pass is the rule's, and the tap of a rule that uses the output's error."""
        return LocalLinearFunction.apply(
            x, weight, bias, self.buffer, self.rule, self.tap_features, self.place
        )

    def follows_rule(self, x: Tensor, *weights: Tensor) -> bool:
        """Return whether the rule makes the backward pass; torch does where the rule is the derivative."""
        elsewhere = self.exact or not torch.is_grad_enabled() or recorded(self, "layer", self.place)
        if elsewhere or self.rule.is_derivative:
            return False
        if not torch.compiler.is_compiling() and has_tangent(x, *weights):
            why = "is about the backward pass and has no derivative in forward mode: see exact_derivatives"
            require(False, "method", self.rule.options.method, why)
        return True

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which would have to read the rule as TorchScript."""
        raise RuntimeError(
            f"layer {self.place!r} cannot be scripted: use torch.compile, or trace it in eval()"
        )

    def extra_repr(self) -> str:
        """Return what ``print(layer)`` shows: the sizes and the rule."""
        return f"{super().extra_repr()}, method={self.rule.options.method!r}"


class LocalLinear(LocalLayer, nn.Linear):
    """A linear layer ``y = x W^T + b`` whose backward pass follows a selectable learning rule.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether to add a bias.
        options: The rule and its feedback; a `LocalGPTConfig` is one too. Default: backpropagation.
        is_output: Whether this layer's output is the network's output. Its own gradient then is the output
            error, under every rule.
        error_features: Width V of the network's output, for a rule that uses the output's error. Such a
            layer must be called with ``taps``.
        device: Where the parameters live.
        dtype: Their floating-point type.

    The feedback, if the rule has one, is a buffer: ``feedback_weight`` (a matrix) or ``feedback_scale``.

    Raises:
        ValueError: If the rule uses the output's error and ``error_features`` is missing.

    Example:
        >>> layer = LocalLinear(3, 2, options=RuleOptions(method="fa"))
        >>> x = torch.ones(4, 3, requires_grad=True)
        >>> layer(x).sum().backward()
        >>> torch.equal(x.grad, torch.ones(4, 2) @ layer.feedback_weight)
        True
    """

    operand = property(lambda self: self.weight, doc="The weight, which the forward pass takes as it is.")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        options: RuleOptions | None = None,
        *,
        is_output: bool = False,
        error_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_integer("in_features", in_features, 1)
        require_integer("out_features", out_features, 1)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        options = options or RuleOptions()
        self._take_rule(options, is_output, error_features)
        self._register_feedback(options)

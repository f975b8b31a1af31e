r"""LocalConv2d: a convolution whose backward pass follows a learning rule with a local error.

Shapes: x (N, in, H, W), W (out, in / groups, kh, kw), y (N, out, H', W'), feedback F like W.

    forward    y           = x * W + b
    backward   grad_weight = the derivative at W, as ever
               grad_bias   = sum over N, H', W' of grad_output
               grad_input  = the transposed convolution of grad_output with F in the place of W

At every place of the image that is grad_input = error @ F of a linear layer on the patch below it, with W and
F as matrices (out x in / groups * kh * kw): so rules, their feedback and its alignment are those of
`LocalLinear`. An error at the network's output has no place in the image; such a rule is refused.
"""

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from localgpt_core.common.functions import TransformableFunction
from localgpt_core.common.validation import require
from localgpt_core.layers.linear import LocalLayer
from localgpt_core.rules import LearningRule, RuleOptions

__all__ = ["LocalConv2d", "LocalConv2dFunction"]

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


class LocalConv2dFunction(TransformableFunction):
    """``apply(x, weight, bias, buffer, rule, geometry) -> y`` with stride, padding, dilation and groups."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        buffer: Tensor | None,
        rule: LearningRule,
        geometry: Geometry,
    ) -> Tensor:
        """Return y."""
        return functional.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Keep the input, the feedback and, for a rule that reads it, the weight."""
        x, weight, _, buffer, ctx.rule, ctx.geometry = inputs
        ctx.shape = weight.shape
        ctx.save_for_backward(x, None if ctx.rule.transports == "nothing" else weight, buffer)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, weight, bias)."""
        x, weight, buffer = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            matrix = None if weight is None else weight.flatten(1)
            feedback = ctx.rule.feedback(matrix, buffer).to(grad_output.dtype).reshape(ctx.shape)
            sent = ctx.rule.signal(grad_output.movedim(1, -1)).movedim(-1, 1)
            grad_input = conv2d_input(x.shape, feedback, sent, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            grad_weight = conv2d_weight(x, ctx.shape, grad_output, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(dim=(0, 2, 3))
        return grad_input, grad_weight, grad_bias, None, None, None


class LocalConv2d(LocalLayer, nn.Conv2d):
    """A convolution that learns by a rule.

    Args:
        args: Those of ``nn.Conv2d``; ``padding`` in numbers, ``padding_mode="zeros"``.
        options: A rule with a local error and its feedback. Default: backpropagation.
        named: Those of ``nn.Conv2d`` by name.

    Raises:
        ValueError: For a rule that uses the output's error, and for another padding.

    Example:
        >>> layer = LocalConv2d(1, 2, 3, options=RuleOptions(method="fa"))
        >>> layer.feedback_weight.shape
        torch.Size([2, 9])
    """

    def __init__(self, *args: object, options: RuleOptions | None = None, **named: object) -> None:
        super().__init__(*args, **named)
        problem = obstacle(self)
        require(problem is None, "padding", self.padding, problem or "")
        options = options or RuleOptions()
        self._take_rule(options, False, None)
        self._register_feedback(options)

    def _take_rule(self, options: RuleOptions, is_output: bool, error_features: int | None) -> None:
        super()._take_rule(options, is_output, error_features or self.out_channels)
        allowed = "uses the output's error, which has no place in an image"
        require(self.tap_features is None, "method", options.method, allowed)

    def oriented(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, of the shape of the weight, as a matrix (out x in / groups * kh * kw)."""
        return tensor.flatten(1)

    @property
    def operand(self) -> Tensor:
        """The weight as the convolution takes it."""
        return self.weight

    @property
    def geometry(self) -> Geometry:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y by torch's own operation."""
        return functional.conv2d(x, weight, bias, *self.geometry)

    def ruled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        """Return y, whose backward pass is the rule's; there is no tap."""
        images = x if x.ndim == 4 else x[None]
        y = LocalConv2dFunction.apply(images, weight, bias, self.buffer, self.rule, self.geometry)
        return y if x.ndim == 4 else y[0], None


def obstacle(layer: nn.Conv2d) -> str | None:
    """Return why the padding of ``layer`` cannot be taken over; None if it can."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return "its padding is none of zeros and numbers, which is all that its backward pass knows"
    return None

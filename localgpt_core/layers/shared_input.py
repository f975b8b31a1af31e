r"""Several linear layers of one input as one product forward and one backward, each with what is its own.

Queries, keys and values are three layers: three weights W_i (n_i x in), three feedback matrices F_i. What
they share is the input x (N x in), and with W the W_i one below the other, F the F_i,

    forward    (y_1 ... y_m) = x @ W^T + b                    (N, in) @ (in, sum n_i)
    backward   grad_W        = (g_1 ... g_m)^T @ x            (sum n_i, N) @ (N, in)
               grad_x        = (s_1 ... s_m) @ F              (N, sum n_i) @ (sum n_i, in)

with g_i the gradient of y_i and s_i what the rule sends of it. A rule that uses the error e of the network's
output sends the same to all: grad_x = s @ (F_1 + ... + F_m). It is what `LocalLinearFunction` computes layer
by layer, in another order of additions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.common.functions import TransformableFunction
from localgpt_core.common.modes import as_autocast, recorded
from localgpt_core.layers.linear import LocalLinear, as_rows, missing_error, own, tap_of
from localgpt_core.rules import LearningRule

__all__ = ["SharedInputFunction", "outputs_of"]


def _below(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat([*tensors])


class SharedInputFunction(TransformableFunction):
    """``apply(x, rules, tap_features, place, *weights, *biases, *buffers) -> (y, tap)``, see the module.

    Shapes: x (..., in), y (..., sum n_i), tap (..., tap_features), None for rules that use the local error.
    The rules of the m layers are of one kind; ``place`` names the layers in messages.
    """

    @staticmethod
    def forward(
        x: Tensor,
        rules: Sequence[LearningRule],
        tap_features: int | None,
        place: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return y, and a tap if ``tap_features`` is given."""
        m = len(rules)
        weight, bias = _below(tensors[:m]), _below(tensors[m : 2 * m])
        y = functional.linear(x, weight) if bias is None else own(functional.linear(x, weight, bias))
        return y, None if tap_features is None else tap_of(x, tap_features)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        """Keep the input, the feedback and, for a rule that reads them, the weights."""
        x, ctx.rules, tap_features, ctx.place, *tensors = inputs
        m = len(ctx.rules)
        ctx.has_tap, ctx.sizes = tap_features is not None, [len(weight) for weight in tensors[:m]]
        reads = ctx.rules[0].transports != "nothing"
        ctx.save_for_backward(x, *(tensors[:m] if reads else [None] * m), *tensors[2 * m :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, tap_error: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the weights, the biases and the feedback."""
        x, *tensors = ctx.saved_tensors
        m = len(ctx.rules)
        kept = zip(ctx.rules, tensors[:m], tensors[m:], strict=True)
        rows, tap_rows = as_rows(grad_output), as_rows(tap_error)
        grad_input, grads = None, [None] * (3 * m)
        error, of_buffers = tap_rows if ctx.has_tap else rows, ctx.has_tap and ctx.rules[0].mirrors_gradient
        if error is None and (ctx.needs_input_grad[0] or of_buffers):
            raise missing_error(ctx.place)
        if ctx.needs_input_grad[0]:
            feedback = [rule.feedback(weight, buffer).to(error.dtype) for rule, weight, buffer in kept]
            joined = torch.stack(feedback).sum(dim=0) if ctx.has_tap else _below(feedback)
            grad_input = (error @ joined).view(x.shape)
        if of_buffers:
            # One error and one input: one gradient for all of them.
            grads[2 * m :] = [(error.T @ as_rows(x)).to(tensors[m].dtype)] * m
        if grad_output is not None:
            if any(ctx.needs_input_grad[4 : 4 + m]):
                grads[:m] = (rows.T @ as_rows(x)).split(ctx.sizes)
            if any(ctx.needs_input_grad[4 + m : 4 + 2 * m]):
                grads[m : 2 * m] = rows.sum(dim=0).split(ctx.sizes)
        return grad_input, None, None, None, *grads


def outputs_of(layers: Sequence[LocalLinear], x: Tensor, taps: list[Tensor]) -> Sequence[Tensor]:
    """Return what each of ``layers`` makes of x (..., in), as one call where that is the same to all.

    It is not where a hook waits for one of them, or where their rules differ or send less than the error.
    Where nothing is learned, the weights need not be joined.
    """
    first = layers[0]
    learns = torch.is_grad_enabled() and all(_joins(layer, first) for layer in layers)
    if not learns or recorded(first, "layer", first.place):
        return [layer(x, taps) for layer in layers]
    sizes = [layer.out_features for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not first.follows_rule(x, *weights):
        return functional.linear(x, _below(weights), _below(biases)).split(sizes, dim=-1)
    x, *tensors = as_autocast(x, *weights, *biases)
    buffers, rules = [layer.buffer for layer in layers], [layer.rule for layer in layers]
    place = ", ".join(str(layer.place) for layer in layers)
    y, tap = SharedInputFunction.apply(x, rules, first.tap_features, place, *tensors, *buffers)
    if tap is not None:
        taps.append(tap)
    return y.split(sizes, dim=-1)


def _joins(layer: nn.Module, first: LocalLinear) -> bool:
    """Return whether ``layer`` may share a call with ``first``."""
    return (
        type(layer) is LocalLinear
        and type(layer.rule) is type(first.rule)
        and type(layer.rule).signal is LearningRule.signal
        and layer.tap_features == first.tap_features
        and layer.exact == first.exact
        and not layer.probed
        and (layer.bias is None) == (first.bias is None)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    )

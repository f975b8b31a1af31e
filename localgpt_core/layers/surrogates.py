r"""Local backward rules for the operations between the linear layers.

==============================  =======================  ====================================================
operation                       forward                  backward (v: gradient arriving)
==============================  =======================  ====================================================
SigmoidSTE                      sigmoid(x)               v
GELUSTE                         exact GELU               v
GELUStepSurrogate               exact GELU               v s(x), s piecewise constant, by mode
  relu                                                   s = 0 | 1                        cut at 0
  steps                                                  s = 0 | a | 1 - a | 1            cut at -t, 0, t
SoftmaxValueMixLocalFn          O = softmax(S) V         dS_ij = A_ij (<dO_i, V_j> - <dO_i, O_i>), dV = A^T dO
SigmoidValueMixFn               O = sigmoid(S) V         dS_ij = A_ij (1 - A_ij) <dO_i, V_j>, dV = A^T dO
==============================  =======================  ====================================================

The last two are exact. The sum over keys that softmax's Jacobian asks for, sum_j A_ij <dO_i, V_j>, is
<dO_i, O_i> by the definition of O: a product of two vectors that the query already has, no sum over its
neighbours. A sigmoid asks for none; its operation makes the scores too, and overwrites them.

``steps`` keeps two bits of each input for the backward pass, as Approx-BP does for fine-tuning (Yang et al.
2024). Their steps fit the function; these fit the derivative, as in Novikov et al. 2022: t = 0.449 and
a = 0.330 minimise the mean squared error of s for standard normal inputs under the symmetry of GELU's
derivative, d(-x) = 1 - d(x).

A second derivative is that of the backward pass, to which an identity or a step function adds nothing.

The straight-through estimator, a backward pass that skips a derivative, is from Bengio, Leonard and
Courville 2013.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import MaybeExact, wide

__all__ = [
    "GELUSTE",
    "FusedValueMix",
    "GELUStepSurrogate",
    "SigmoidSTE",
    "SigmoidValueMixFn",
    "SoftmaxValueMixLocalFn",
    "StraightThrough",
    "SurrogateGELU",
    "SurrogateSigmoid",
    "masked",
    "scored",
    "unseen",
]

# Where a step function for GELU's derivative is cut, and its levels between the cuts, by mode.
STEPS = {"relu": ((0.0,), (0.0, 1.0)), "steps": ((-0.449, 0.0, 0.449), (0.0, 0.33, 0.67, 1.0))}


class StraightThrough(LocalFunction):
    """``apply(x, y)``: the value y in the forward pass, the identity towards x in the backward pass.

    What is returned shares its memory with y.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        """Return y; ``x`` and ``y`` have the same shape."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x, which is the gradient that arrives."""
        return grad_output, None


class SigmoidSTE(LocalFunction):
    """``apply(x)``: sigmoid(x) with the identity as its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Return sigmoid(x), elementwise."""
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        """Return ``grad_output``."""
        return grad_output


class GELUSTE(LocalFunction):
    """``apply(x)``: the exact GELU, x Phi(x), with the identity as its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Return GELU(x), elementwise."""
        return functional.gelu(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        """Return ``grad_output``."""
        return grad_output


class GELUStepSurrogate(LocalFunction):
    """``apply(x, mode)``: the exact GELU with a step function of x as its derivative; see the module."""

    STEPS = STEPS

    @staticmethod
    def forward(ctx, x: Tensor, mode: str) -> Tensor:
        """Return GELU(x), elementwise."""
        cuts, ctx.levels = STEPS[mode]
        # Which step an input is on takes a byte here and two bits in principle, not the input itself.
        # A cut is not on the grid of half precision: compared there, it would be another one.
        precise = wide(x)
        ctx.save_for_backward(sum((precise > cut).to(torch.uint8) for cut in cuts))
        return functional.gelu(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return ``grad_output`` times the level of the step that each input is on."""
        (step,) = ctx.saved_tensors
        # Filled where it is used: a table that came from the host would make the device wait.
        levels = torch.stack([grad_output.new_full((), level) for level in ctx.levels])
        return grad_output * levels[step.int()], None


class SurrogateGELU(MaybeExact, nn.Module):
    """GELU with a surrogate derivative: ``"identity"``, or a step function (`GELUStepSurrogate`)."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def exact_forward(self, x: Tensor) -> Tensor:
        """Return GELU(x)."""
        return functional.gelu(x)

    def local_forward(self, x: Tensor) -> Tensor:
        """Return GELU(x)."""
        return GELUSTE.apply(x) if self.mode == "identity" else GELUStepSurrogate.apply(x, self.mode)


class SurrogateSigmoid(MaybeExact, nn.Module):
    """The sigmoid with the identity as its derivative."""

    def exact_forward(self, x: Tensor) -> Tensor:
        """Return sigmoid(x)."""
        return torch.sigmoid(x)

    def local_forward(self, x: Tensor) -> Tensor:
        """Return sigmoid(x)."""
        return SigmoidSTE.apply(x)


class SoftmaxValueMixLocalFn(LocalFunction):
    """``apply(scores, value)``: O = softmax(scores) V with a backward pass that each query computes alone.

    ``scores`` is (..., T, S), with -inf where a query may not look; ``value`` is (..., S, D), O (..., T, D).
    A second derivative is refused: it would take the scores, which are not kept.
    """

    twice = False

    @staticmethod
    def forward(ctx, scores: Tensor, value: Tensor) -> Tensor:
        """Return O (..., T, D)."""
        attention = torch.softmax(scores, dim=-1).to(value.dtype)
        output = attention @ value
        if output.ndim > 3:
            # Heads side by side in memory: joining them is then a view, and what is saved here is the very
            # tensor that the layer behind attention saves as its input.
            output = output.transpose(-3, -2).contiguous().transpose(-3, -2)
        ctx.save_for_backward(attention, value, output)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Return dS_ij = A_ij (<dO_i, V_j> - <dO_i, O_i>) and dV = A^T dO."""
        attention, value, output = ctx.saved_tensors
        own = (grad_output * output).sum(dim=-1, keepdim=True)
        grad_scores = (grad_output @ value.transpose(-2, -1)).sub_(own).mul_(attention)
        return grad_scores, attention.transpose(-2, -1) @ grad_output


class FusedValueMix(MaybeExact, nn.Module):
    """``mix(scores, value)``: softmax(scores) V, with the backward pass of `SoftmaxValueMixLocalFn`."""

    def exact_forward(self, scores: Tensor, value: Tensor) -> Tensor:
        """Return O (..., T, D)."""
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value

    def local_forward(self, scores: Tensor, value: Tensor) -> Tensor:
        """Return O (..., T, D)."""
        return SoftmaxValueMixLocalFn.apply(scores, value)


class SigmoidValueMixFn(LocalFunction):
    """``apply(q, k, v, bias, future)``: O = A v, A = sigmoid(q k^T / sqrt(D) + bias), by its own derivative.

    q is (N, T, D), k (N, S, D), v (N, S, E), O (N, T, E); A is 0 where ``future`` (T, S) is True, for None
    where the key comes later. The bias is a number or a tensor without dimensions.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float, future: Tensor | None) -> Tensor:
        """Return O (N, T, E)."""
        weights = scored(q, k, masked(q, k, bias, future)).sigmoid_()
        ctx.bias, learned = (None, bias) if isinstance(bias, Tensor) else (bias, None)
        ctx.save_for_backward(q, k, v, weights, future, learned)
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return dq = dS k / sqrt(D), dk = dS^T q / sqrt(D), dv = A^T dO and d bias, the sum of dS."""
        q, k, v, weights, future, learned = ctx.saved_tensors
        bias = ctx.bias if learned is None else learned
        scale = q.shape[-1] ** -0.5
        grad = torch.bmm(grad_output, v.transpose(1, 2))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A second derivative reaches q, k and the bias through the weights.
            weights = torch.sigmoid(scored(q, k, masked(q, k, bias, future)))
            grad = torch.ops.aten.sigmoid_backward(grad, weights)
        else:
            torch.ops.aten.sigmoid_backward(grad, weights, grad_input=grad)
        return (
            torch.bmm(grad, k) * scale,
            torch.bmm(grad.transpose(1, 2), q) * scale,
            torch.bmm(weights.transpose(1, 2), grad_output),
            grad.sum().to(bias.dtype) if ctx.needs_input_grad[3] else None,
            None,
        )


def scored(q: Tensor, k: Tensor, shift: Tensor) -> Tensor:
    """Return the scores q k^T / sqrt(D) + shift, (..., T, S); ``shift`` is (T, S)."""
    q_NTD, k_NSD = q.flatten(0, -3), k.flatten(0, -3)
    scores = torch.baddbmm(shift, q_NTD, k_NSD.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return scores.view(*q.shape[:-2], *shift.shape)


def unseen(q: Tensor, k: Tensor, future: Tensor | None) -> Tensor:
    """Return ``future`` (T, S), True where a query does not see a key.

    For None that is where the key comes later, the T queries being at the last of the S positions.
    """
    T, S = q.shape[-2], k.shape[-2]
    return q.new_ones(T, S, dtype=torch.bool).triu_(1 + S - T) if future is None else future


def masked(q: Tensor, k: Tensor, bias: Tensor | float, future: Tensor | None) -> Tensor:
    """Return a shift of scores (T, S), of the type of ``q``: the bias, and -inf where a key is `unseen`."""
    shift = q.new_zeros(q.shape[-2], k.shape[-2]) + bias
    return shift.masked_fill(unseen(q, k, future), -torch.inf)

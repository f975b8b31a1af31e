r"""Local backward rules for the operations between the linear layers.

==============================  =======================  ====================================================
operation                       forward                  backward (v: gradient arriving, z: normalised input)
==============================  =======================  ====================================================
SigmoidSTE                      sigmoid(x)               v
GELUSTE                         exact GELU               v
LayerNormSTE                    LayerNorm                v; nothing to gamma and beta
LayerNormProjectedSurrogate     LayerNorm                v = g gamma, then by mode
  center_scale                                           (v - mean v) / sigma
  projected                                              (v - mean v - z mean(v z)) / sigma
SoftmaxValueMixLocalFn          O = softmax(S) V         dS_ij = A_ij (<dO_i, V_j> - <dO_i, O_i>), dV = A^T dO
==============================  =======================  ====================================================

Two of them are exact. ``projected`` is LayerNorm's own Jacobian (Ba, Kiros and Hinton 2016; Xu et al. 2019).
In the softmax rule the sum over keys that softmax's Jacobian asks for, sum_j A_ij <dO_i, V_j>, is <dO_i, O_i>
by the definition of O: a product of two vectors that the query already has, no sum over its neighbours.

The straight-through estimator, a backward pass that skips a derivative, is from Bengio, Leonard and
Courville 2013.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.exact import MaybeExact
from localgpt_core.validation import require_choice

__all__ = [
    "GELUSTE",
    "LayerNormProjectedSurrogate",
    "LayerNormSTE",
    "SigmoidSTE",
    "SoftmaxValueMixLocalFn",
    "StraightThrough",
]

EPS = 1e-5


class StraightThrough(torch.autograd.Function):
    """``apply(x, y)``: the value y in the forward pass, the identity towards x in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        """Return y; ``x`` and ``y`` have the same shape."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x, which is the gradient that arrives."""
        return grad_output, None


class SigmoidSTE(torch.autograd.Function):
    """``apply(x)``: sigmoid(x) with the identity as its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Return sigmoid(x), elementwise."""
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        """Return ``grad_output``."""
        return grad_output


class GELUSTE(torch.autograd.Function):
    """``apply(x)``: the exact GELU, x Phi(x), with the identity as its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Return GELU(x), elementwise."""
        return functional.gelu(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        """Return ``grad_output``."""
        return grad_output


class LayerNormSTE(MaybeExact, nn.Module):
    """LayerNorm over the last dimension whose backward pass is the identity.

    gamma and beta (``ln.weight``, ``ln.bias``) sit inside the skipped path: they receive no gradient and
    stay at their start, so they do not ask for one.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(n_embd, eps=EPS).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        if self.exact:
            return self.ln(x)
        with torch.no_grad():
            y = self.ln(x)
        return StraightThrough.apply(x, y.to(x.dtype))


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return z = (x - mean) / sigma over the last dimension and 1 / sigma, in float32 for half inputs."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    inverse_sigma = torch.rsqrt(variance + EPS)
    return (wide - mean) * inverse_sigma, inverse_sigma


def normalise_backward(grad_output: Tensor, z: Tensor | None, inverse_sigma: Tensor) -> Tensor:
    """Return (v - mean v - z mean(v z)) / sigma, v = ``grad_output``; no last term where z is None."""
    v = grad_output.to(inverse_sigma.dtype)
    centred = v - v.mean(dim=-1, keepdim=True)
    if z is not None:
        centred = centred - z * (v * z).mean(dim=-1, keepdim=True)
    return (centred * inverse_sigma).to(grad_output.dtype)


class _NormaliseFunction(torch.autograd.Function):
    """``apply(x, projected)``: z = (x - mean) / sigma over the last dimension, with either backward rule."""

    @staticmethod
    def forward(ctx, x: Tensor, projected: bool) -> Tensor:
        z, inverse_sigma = normalise(x)
        ctx.save_for_backward(z if projected else None, inverse_sigma)
        return z.to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return normalise_backward(grad_output, *ctx.saved_tensors), None


class LayerNormProjectedSurrogate(MaybeExact, nn.Module):
    """LayerNorm z gamma + beta with a chosen backward rule for z; gamma and beta get their true gradients.

    The variance is biased, eps is 1e-5, and the statistics of half-precision inputs are taken in float32.

    Args:
        n_embd: Width of the normalised dimension.
        mode: ``"projected"``, the exact Jacobian, or ``"center_scale"``, which drops its radial term
            z mean(v z).

    Raises:
        ValueError: For another mode.
    """

    MODES = ("center_scale", "projected")

    def __init__(self, n_embd: int, mode: str = "projected") -> None:
        super().__init__()
        require_choice("mode", mode, self.MODES)
        self.mode = mode
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias_param = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        if self.exact:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias_param, EPS)
        return _NormaliseFunction.apply(x, self.mode == "projected") * self.weight + self.bias_param


class SoftmaxValueMixLocalFn(torch.autograd.Function):
    """``apply(scores, value)``: O = softmax(scores) V with a backward pass that each query computes alone.

    ``scores`` is (..., T, S), with -inf where a query may not look; ``value`` is (..., S, D), O (..., T, D).
    """

    @staticmethod
    def forward(ctx, scores: Tensor, value: Tensor) -> Tensor:
        """Return O (..., T, D)."""
        attention = torch.softmax(scores, dim=-1).to(value.dtype)
        output = attention @ value
        ctx.save_for_backward(attention, value, output)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Return dS_ij = A_ij (<dO_i, V_j> - <dO_i, O_i>) and dV = A^T dO."""
        attention, value, output = ctx.saved_tensors
        own = (grad_output * output).sum(dim=-1, keepdim=True)
        grad_scores = (grad_output @ value.transpose(-2, -1)).sub_(own).mul_(attention)
        return grad_scores, attention.transpose(-2, -1) @ grad_output

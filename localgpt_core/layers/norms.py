r"""Normalisation with a backward rule of its own.

============================  =======================  ====================================================
operation                     forward                  backward (v: gradient arriving, z: normalised input)
============================  =======================  ====================================================
LayerNormSTE                  LayerNorm                v; nothing to gamma and beta
LayerNormProjectedSurrogate   LayerNorm                v = g gamma, then by mode
  scale                                                v / sigma
  center_scale                                         (v - mean v) / sigma
  projected                                            (v - mean v - z mean(v z)) / sigma
FixedNorm                     (x / size) gamma + beta  its own derivative
============================  =======================  ====================================================

``projected`` is LayerNorm's own Jacobian (Ba, Kiros and Hinton 2016; Xu et al. 2019). ``scale`` treats mean
and sigma as constants (DetachNorm in Xu et al. 2019).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import MaybeExact
from localgpt_core.common.validation import require_choice
from localgpt_core.layers.surrogates import StraightThrough

__all__ = [
    "EPS",
    "FixedNorm",
    "LayerNormProjectedSurrogate",
    "LayerNormSTE",
    "LayerNormSurrogateFunction",
    "normalise",
    "normalise_backward",
]

EPS = 1e-5


class LayerNormSTE(MaybeExact, nn.Module):
    """LayerNorm over the last dimension whose backward pass is the identity.

    gamma and beta (``ln.weight``, ``ln.bias``) sit inside the skipped path: they receive no gradient and
    stay at their start, so they do not ask for one.
    """

    def __init__(self, n_embd: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(n_embd, eps=EPS, dtype=dtype).requires_grad_(False)

    def exact_forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        return self.ln(x)

    def local_forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        with torch.no_grad():
            y = self.ln(x)
        return StraightThrough.apply(x, y.to(x.dtype))


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return z = (x - mean) / sigma over the last dimension and 1 / sigma, in float32 for half inputs."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if wide.numel() == 0:  # torch warns of a variance of nothing
        return wide.clone(), wide.sum(dim=-1, keepdim=True)
    z, _, inverse_sigma = torch.native_layer_norm(wide, wide.shape[-1:], None, None, EPS)
    return z, inverse_sigma


def normalise_backward(
    grad_output: Tensor, z: Tensor | None, inverse_sigma: Tensor, center: bool = True
) -> Tensor:
    """Return (v - mean v - z mean(v z)) / sigma, v = ``grad_output``.

    Without ``center`` the term mean v is left out, and the last term where z is None.
    """
    v = grad_output.to(inverse_sigma.dtype)
    kept = v - v.mean(dim=-1, keepdim=True) if center else v
    if z is not None:
        kept = kept - z * (v * z).mean(dim=-1, keepdim=True)
    return (kept * inverse_sigma).to(grad_output.dtype)


class LayerNormSurrogateFunction(LocalFunction):
    """``apply(x, gamma, beta, mode)``: LayerNorm z gamma + beta with the mode's backward rule for z.

    x is (..., C), gamma and beta are (C,), all of one type, float32 at least.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, mode: str) -> Tensor:
        """Return LayerNorm(x)."""
        ctx.mode = mode
        y, mean, inverse_sigma = torch.native_layer_norm(x, x.shape[-1:], gamma, beta, EPS)
        ctx.save_for_backward(x, gamma, beta, mean, inverse_sigma)
        return y

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the mode's gradient of x, and those of gamma, sum of g z, and of beta, sum of g."""
        x, gamma, beta, mean, inverse_sigma = ctx.saved_tensors
        center, radial = ctx.mode != "scale", ctx.mode == "projected"
        with torch.no_grad():
            grads = torch.ops.aten.native_layer_norm_backward(
                grad_output, x, x.shape[-1:], mean, inverse_sigma, gamma, beta, [radial, True, True]
            )
            if not radial:
                grads = normalise_backward(grad_output * gamma, None, inverse_sigma, center), *grads[1:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The same numbers, with a graph for further derivatives: torch leaves part of the third one out.
            centred = x - x.mean(dim=-1, keepdim=True)
            inverse_sigma = (centred.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
            z = centred * inverse_sigma
            grad = normalise_backward(grad_output * gamma, z if radial else None, inverse_sigma, center)
            formulas = grad, (grad_output * z).sum_to_size(gamma.shape), grad_output.sum_to_size(beta.shape)
            grads = [n + (f - f.detach()) for n, f in zip(grads, formulas, strict=True)]
        return *grads, None


class LayerNormProjectedSurrogate(MaybeExact, nn.Module):
    """LayerNorm z gamma + beta with a chosen backward rule for z; gamma and beta get their true gradients.

    The variance is biased, eps is 1e-5, and the statistics of half-precision inputs are taken in float32.

    Args:
        n_embd: Width of the normalised dimension.
        mode: ``"projected"``, the exact Jacobian; ``"center_scale"``, which drops its radial term
            z mean(v z); or ``"scale"``, which drops the mean as well. A second derivative is that of the
            backward pass.
        dtype: Floating-point type of gamma and beta; torch's default where none is given.

    Raises:
        ValueError: For another mode.
    """

    MODES = ("center_scale", "projected", "scale")

    def __init__(self, n_embd: int, mode: str = "projected", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        require_choice("mode", mode, self.MODES)
        self.mode = mode
        self.weight = nn.Parameter(torch.ones(n_embd, dtype=dtype))
        self.bias_param = nn.Parameter(torch.zeros(n_embd, dtype=dtype))

    def exact_forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias_param, EPS)

    def local_forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        kind = torch.promote_types(x.dtype, self.weight.dtype)
        precise = torch.promote_types(kind, torch.float32)
        x, gamma, beta = (t.to(precise) for t in (x, self.weight, self.bias_param))
        return LayerNormSurrogateFunction.apply(x, gamma, beta, self.mode).to(kind)


def gain(norm: nn.Module) -> Tensor:
    """Return by what (C,) one of the norms here, or torch's, multiplies its normalised input."""
    if isinstance(norm, FixedNorm):
        return norm.weight / norm.size
    return (norm.ln if isinstance(norm, LayerNormSTE) else norm).weight


class FixedNorm(nn.Module):
    """No normalisation: (x / size) gamma + beta, with a constant ``size``; its derivative is exact.

    A control for LayerNorm: with ``size`` the RMS that x starts with, both begin with the same values, up to
    the mean, and from then on nothing holds the scale of x.
    """

    def __init__(self, n_embd: int, size: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(n_embd, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(n_embd, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return (x / size) gamma + beta for x (..., n_embd)."""
        return x * (self.weight / self.size) + self.bias

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

from localgpt_core.common.functions import INSTEAD, LocalFunction
from localgpt_core.common.modes import MaybeExact
from localgpt_core.common.validation import require_choice
from localgpt_core.layers.surrogates import StraightThrough

__all__ = [
    "EPS",
    "FixedNorm",
    "LayerNormProjectedSurrogate",
    "LayerNormSTE",
    "normalise",
    "normalise_backward",
    "normalised",
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


class _NormaliseFunction(LocalFunction):
    """``apply(x, mode) -> (z, 1 / sigma)``: x normalised, in float32 at least, with a backward rule by mode.

    1 / sigma is an output so that the derivative of the backward pass reaches x through it as well.
    """

    @staticmethod
    def forward(ctx, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        z, inverse_sigma = normalise(x)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z if mode == "projected" else None, inverse_sigma)
        return z, inverse_sigma

    @staticmethod
    def backward(
        ctx, grad_output: Tensor | None, grad_inverse_sigma: Tensor | None
    ) -> tuple[Tensor | None, None]:
        z, inverse_sigma = ctx.saved_tensors
        grad = None
        if grad_output is not None:
            grad = normalise_backward(grad_output, z, inverse_sigma, center=ctx.mode != "scale")
        # In a second derivative only. To the compiler, which refuses one itself, no gradient is ever None.
        if grad_inverse_sigma is not None and not torch.compiler.is_compiling():
            if z is None:
                where = f"_NormaliseFunction (LayerNormProjectedSurrogate, mode={ctx.mode!r})"
                raise RuntimeError(f"{where} has no second derivative; {INSTEAD}")
            through_sigma = -grad_inverse_sigma * inverse_sigma.square() * z / z.shape[-1]
            grad = through_sigma if grad is None else grad + through_sigma
        return grad, None


def normalised(x: Tensor, mode: str = "projected") -> Tensor:
    """Return z = (x - mean) / sigma over the last dimension, with the mode's backward rule."""
    z, _ = _NormaliseFunction.apply(x, mode)
    return z.to(x.dtype)


class LayerNormProjectedSurrogate(MaybeExact, nn.Module):
    """LayerNorm z gamma + beta with a chosen backward rule for z; gamma and beta get their true gradients.

    The variance is biased, eps is 1e-5, and the statistics of half-precision inputs are taken in float32.

    Args:
        n_embd: Width of the normalised dimension.
        mode: ``"projected"``, the exact Jacobian, which has a second derivative too; ``"center_scale"``,
            which drops its radial term z mean(v z); or ``"scale"``, which drops the mean as well.
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
        return normalised(x, self.mode) * self.weight + self.bias_param


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

r"""Local backward rules for the operations between the linear layers.

==============================  =======================  ====================================================
operation                       forward                  backward (v: gradient arriving, z: normalised input)
==============================  =======================  ====================================================
SigmoidSTE                      sigmoid(x)               v
GELUSTE                         exact GELU               v
GELUStepSurrogate               exact GELU               v s(x), s piecewise constant, by mode
  relu                                                   s = 0 | 1                        cut at 0
  steps                                                  s = 0 | a | 1 - a | 1            cut at -t, 0, t
LayerNormSTE                    LayerNorm                v; nothing to gamma and beta
LayerNormProjectedSurrogate     LayerNorm                v = g gamma, then by mode
  scale                                                  v / sigma
  center_scale                                           (v - mean v) / sigma
  projected                                              (v - mean v - z mean(v z)) / sigma
SoftmaxValueMixLocalFn          O = softmax(S) V         dS_ij = A_ij (<dO_i, V_j> - <dO_i, O_i>), dV = A^T dO
==============================  =======================  ====================================================

Two of them are exact. ``projected`` is LayerNorm's own Jacobian (Ba, Kiros and Hinton 2016; Xu et al. 2019).
In the softmax rule the sum over keys that softmax's Jacobian asks for, sum_j A_ij <dO_i, V_j>, is <dO_i, O_i>
by the definition of O: a product of two vectors that the query already has, no sum over its neighbours.

``scale`` treats mean and sigma as constants (DetachNorm in Xu et al. 2019). ``steps`` keeps two bits of each
input for the backward pass, as Approx-BP does for fine-tuning (Yang et al. 2024). Their steps fit the
function; these fit the derivative, as in Novikov et al. 2022: t = 0.449 and a = 0.330 minimise the mean
squared error of s for standard normal inputs under the symmetry of GELU's derivative, d(-x) = 1 - d(x).

The straight-through estimator, a backward pass that skips a derivative, is from Bengio, Leonard and
Courville 2013.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.modes import MaybeExact
from localgpt_core.validation import require_choice

__all__ = [
    "GELUSTE",
    "FixedNorm",
    "FusedValueMix",
    "GELUStepSurrogate",
    "LayerNormProjectedSurrogate",
    "LayerNormSTE",
    "SigmoidSTE",
    "SoftmaxValueMixLocalFn",
    "StraightThrough",
    "SurrogateGELU",
    "SurrogateSigmoid",
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


class GELUStepSurrogate(torch.autograd.Function):
    """``apply(x, mode)``: the exact GELU with a step function of x as its derivative; see the module."""

    STEPS = {"relu": ((0.0,), (0.0, 1.0)), "steps": ((-0.449, 0.0, 0.449), (0.0, 0.33, 0.67, 1.0))}

    @staticmethod
    def forward(ctx, x: Tensor, mode: str) -> Tensor:
        """Return GELU(x), elementwise."""
        cuts, ctx.levels = GELUStepSurrogate.STEPS[mode]
        # Which step an input is on takes a byte here and two bits in principle, not the input itself.
        ctx.save_for_backward(sum((x > cut).to(torch.uint8) for cut in cuts))
        return functional.gelu(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return ``grad_output`` times the level of the step that each input is on."""
        (step,) = ctx.saved_tensors
        levels = torch.tensor(ctx.levels, dtype=grad_output.dtype, device=grad_output.device)
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


class LayerNormSTE(MaybeExact, nn.Module):
    """LayerNorm over the last dimension whose backward pass is the identity.

    gamma and beta (``ln.weight``, ``ln.bias``) sit inside the skipped path: they receive no gradient and
    stay at their start, so they do not ask for one.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(n_embd, eps=EPS).requires_grad_(False)

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
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    inverse_sigma = torch.rsqrt(variance + EPS)
    return (wide - mean) * inverse_sigma, inverse_sigma


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


class _NormaliseFunction(torch.autograd.Function):
    """``apply(x, mode)``: z = (x - mean) / sigma over the last dimension, with the mode's backward rule."""

    @staticmethod
    def forward(ctx, x: Tensor, mode: str) -> Tensor:
        z, inverse_sigma = normalise(x)
        ctx.center = mode != "scale"
        ctx.save_for_backward(z if mode == "projected" else None, inverse_sigma)
        return z.to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return normalise_backward(grad_output, *ctx.saved_tensors, center=ctx.center), None


class LayerNormProjectedSurrogate(MaybeExact, nn.Module):
    """LayerNorm z gamma + beta with a chosen backward rule for z; gamma and beta get their true gradients.

    The variance is biased, eps is 1e-5, and the statistics of half-precision inputs are taken in float32.

    Args:
        n_embd: Width of the normalised dimension.
        mode: ``"projected"``, the exact Jacobian; ``"center_scale"``, which drops its radial term
            z mean(v z); or ``"scale"``, which drops the mean as well.

    Raises:
        ValueError: For another mode.
    """

    MODES = ("center_scale", "projected", "scale")

    def __init__(self, n_embd: int, mode: str = "projected") -> None:
        super().__init__()
        require_choice("mode", mode, self.MODES)
        self.mode = mode
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias_param = nn.Parameter(torch.zeros(n_embd))

    def exact_forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias_param, EPS)

    def local_forward(self, x: Tensor) -> Tensor:
        """Return LayerNorm(x) for x (..., n_embd)."""
        return _NormaliseFunction.apply(x, self.mode) * self.weight + self.bias_param


class FixedNorm(nn.Module):
    """No normalisation: (x / size) gamma + beta, with a constant ``size``; its derivative is exact.

    A control for LayerNorm: with ``size`` the RMS that x starts with, both begin with the same values, up to
    the mean, and from then on nothing holds the scale of x.
    """

    def __init__(self, n_embd: int, size: float) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """Return (x / size) gamma + beta for x (..., n_embd)."""
        return x * (self.weight / self.size) + self.bias


class SoftmaxValueMixLocalFn(torch.autograd.Function):
    """``apply(scores, value)``: O = softmax(scores) V with a backward pass that each query computes alone.

    ``scores`` is (..., T, S), with -inf where a query may not look; ``value`` is (..., S, D), O (..., T, D).
    """

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

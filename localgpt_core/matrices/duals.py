r"""Forward mode with as few operations as its formulas have.

For y = f(x, w) where x has a tangent x' and w has none, torch gives w a tangent of zeros and computes with
that too. `LeanForwardMode` leaves such work out, and takes the derivative of a LayerNorm from the kernel of
its backward pass:

    linear         y' = x' W^T
    times, over    y' = x' w,   x' / w
    baddbmm        y' = alpha (a' b + a b')                          for y = c + alpha a b
    layer_norm     y' = gamma (x' - mean x' - z mean(x' z)) / sigma

The last is a formula of backward passes because the Jacobian of z in x is symmetric. Values and tangents are
those of torch up to rounding. An operation that has no line here, other arguments with tangents, half
precision and autocast are left to torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["LeanForwardMode"]

Pair = tuple[Tensor, Tensor]  # value and tangent


def _linear(x: Pair, weight: Tensor, bias: Tensor | None = None) -> Pair:
    return functional.linear(x[0], weight, bias), functional.linear(x[1], weight)


def _times(x: Pair, factor: Tensor | float) -> Pair:
    return x[0] * factor, x[1] * factor


def _over(x: Pair, divisor: Tensor | float) -> Pair:
    return x[0] / divisor, x[1] / divisor


def _baddbmm(c: Tensor, a: Pair, b: Pair, alpha: float = 1.0) -> Pair:
    tangent = torch.baddbmm(torch.bmm(a[1], b[0]), a[0], b[1])
    return torch.baddbmm(c, a[0], b[0], alpha=alpha), tangent.mul_(alpha)


def _layer_norm(
    x: Pair,
    shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Pair:
    y, *statistics = torch.native_layer_norm(x[0], shape, weight, bias, eps)
    backward = torch.ops.aten.native_layer_norm_backward
    tangent, _, _ = backward(x[1], x[0], shape, *statistics, None, None, [True, False, False])
    return y, tangent if weight is None else tangent * weight


# By function: the places of the arguments that have a tangent, and what it returns then.
FORMULAS: dict[Callable, tuple[set[int], Callable[..., Pair]]] = {
    functional.linear: ({0}, _linear),
    torch.Tensor.mul: ({0}, _times),
    torch.Tensor.div: ({0}, _over),
    torch.baddbmm: ({1, 2}, _baddbmm),
    functional.layer_norm: ({0}, _layer_norm),
}


class LeanForwardMode(TorchFunctionMode):
    """Inside the ``with`` block, dual tensors go through the formulas of this module."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what ``func`` returns."""
        kwargs = kwargs or {}
        # Autocast, and the types of a LayerNorm in half precision, are not the business of kernels.
        if func in FORMULAS and not torch._C._is_any_autocast_enabled() and args[0].itemsize >= 4:
            places, formula = FORMULAS[func]
            pairs = {i: pair for i, arg in enumerate(args) if (pair := _pair(arg)) is not None}
            if set(pairs) == places and all(_pair(arg) is None for arg in kwargs.values()):
                return make_dual(*formula(*(pairs.get(i, arg) for i, arg in enumerate(args)), **kwargs))
        return func(*args, **kwargs)


def _pair(arg: Any) -> Pair | None:
    """Return the value and tangent of a dual tensor, None for anything else."""
    pair = unpack_dual(arg) if isinstance(arg, Tensor) else None
    return None if pair is None or pair.tangent is None else pair

"""The base of every operation with a backward pass of its own: what it cannot do it refuses by name.

An autograd Function whose backward pass uses a tensor that is neither its input nor its output looks as if
it could be differentiated again, while that tensor counts as a constant. Such a Function says
``twice = False``. Forward mode and the transforms of ``torch.func`` would need more than a backward pass.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["LocalFunction", "TransformableFunction"]

INSTEAD = "inside localgpt_core.common.exact_derivatives(model) torch's own operations take its place"


class LocalFunction(torch.autograd.Function):
    """An autograd Function that refuses by its name what it has no derivative for.

    Attributes:
        twice: Whether its backward pass can be differentiated. If not, its inputs or outputs must be among
            the saved tensors: a second derivative on its way to them is what raises RuntimeError.

    Raises:
        NotImplementedError: From ``apply``, for an input with a forward-mode tangent or of ``torch.func``.
    """

    twice: ClassVar[bool] = True

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        if not cls.twice and "backward" in vars(cls):
            cls.backward = staticmethod(_once(cls.backward, cls.__name__))

    # Not by a jvp method, which torch.compile does not accept.
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Return what the forward pass returns."""
        try:
            return super().apply(*args)
        except RuntimeError as error:  # what torch raises for either names no Function
            if "jvp" not in str(error):
                raise
        problem = "has a backward pass only: no forward mode and no torch.func"
        raise NotImplementedError(f"{cls.__name__} {problem}; {INSTEAD}")


class TransformableFunction(torch.autograd.Function):
    """An autograd Function for ``torch.func`` as well: ``forward`` without ctx, and ``setup_context``."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Return what the forward pass returns."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # Past torch's Function.apply, which binds the arguments to names: longer than a small matrix product.
        return super(torch.autograd.Function, cls).apply(*args)


class _SecondDerivative(torch.autograd.Function):
    """``apply(name, n, *gradients, *edges)``: the n gradients, on whose way back to the edges it raises."""

    @staticmethod
    def forward(ctx, name: str, n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors[:n])

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> None:
        raise RuntimeError(f"{ctx.name} has no second derivative; {INSTEAD}")


def _once(backward: Callable, name: str) -> Callable:
    """Return ``backward`` with gradients that refuse to be differentiated again."""

    @wraps(backward)
    def guarded(ctx, *grad_outputs: Tensor | None) -> Any:
        gradients = backward(ctx, *grad_outputs)
        if not torch.is_grad_enabled():
            return gradients
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return _SecondDerivative.apply(name, len(gradients), *gradients, *ctx.saved_tensors, *grad_outputs)

    return guarded

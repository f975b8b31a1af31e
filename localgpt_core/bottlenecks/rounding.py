r"""Plain rounding of every number of a token: what codes have to be better than.

With a = max_i |h_i| of the token and n = 2^b - 1, b bits a number,

    y_i = a (2 k_i / n - 1),   k_i = round(n (h_i / a + 1) / 2),   one of 2^b levels, equally far apart,

so that -a and a are levels and zero is none. b C bits a token and its scale a. The backward pass is the
identity (straight through).
"""

import torch
from torch import Tensor, nn

from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import MaybeExact, narrow, wide
from localgpt_core.common.validation import require_integer
from localgpt_core.config.allowed import MOST_BITS

__all__ = ["UniformRounding", "rounded"]


def rounded(h: Tensor, bits: int) -> Tensor:
    """Return the tokens h (..., C) at the nearest levels; differentiable by the scale of each."""
    x, steps = wide(h), 2**bits - 1
    scale = x.abs().amax(dim=-1, keepdim=True)
    # A token of zeros has one level, and any index will do.
    inside = (x / torch.where(scale > 0, scale, 1)).detach()
    level = 2 * torch.round(steps * (inside + 1) / 2) / steps - 1
    return narrow(scale * level, h)


class _RoundedStraightThrough(LocalFunction):
    """``apply(h, bits)``: `rounded`, with the identity as its backward pass."""

    @staticmethod
    def forward(ctx, h: Tensor, bits: int) -> Tensor:
        return rounded(h, bits)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class UniformRounding(MaybeExact, nn.Module):
    """Round every number of a token to ``bits`` bits, on a scale of the token's own.

    Args:
        bits: Bits a number: 2^bits levels from -a to a, the largest magnitude of the token.

    Raises:
        ValueError: Unless 1 <= bits <= 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        require_integer("bits", bits, 1, MOST_BITS)
        self.bits = bits

    def exact_forward(self, h: Tensor) -> Tensor:
        """Return the rounded tokens, shaped like h (..., C)."""
        return rounded(h, self.bits)

    def local_forward(self, h: Tensor) -> Tensor:
        """Return the rounded tokens, shaped like h (..., C)."""
        return _RoundedStraightThrough.apply(h, self.bits)

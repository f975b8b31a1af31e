"""Hard top-k: exactly the k entries of largest magnitude survive."""

from torch import Tensor, nn

from localgpt_core.bottlenecks.selection import keep, winners
from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import MaybeExact
from localgpt_core.common.validation import require_integer

__all__ = ["HardTopK", "TopK", "keep_winners"]


class HardTopK(LocalFunction):
    """``apply(x, k)``: keep the k entries of largest magnitude of the last dimension, zero the others.

    Exactly k survive, ties included, and the gradient passes through the same k places (k-winners-take-all;
    Makhzani and Frey 2013).
    """

    @staticmethod
    def forward(ctx, x: Tensor, k: int) -> Tensor:
        """Return x with all but k entries per row set to zero.

        Raises:
            ValueError: Unless 1 <= k <= x.shape[-1].
        """
        require_integer("k", k, 1, x.shape[-1])
        mask = winners(x.detach().abs(), k)
        ctx.save_for_backward(mask)
        return keep(x, mask)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return the gradient at the k winners, zero elsewhere."""
        (mask,) = ctx.saved_tensors
        return keep(grad_output, mask), None


def keep_winners(x: Tensor, k: int) -> Tensor:
    """Return `HardTopK` of x by an operation that torch differentiates itself, in forward mode too."""
    return x * winners(x.detach().abs(), k)


class TopK(MaybeExact, nn.Module):
    """Keep the k entries of largest magnitude of the last dimension (`HardTopK`)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def exact_forward(self, x: Tensor) -> Tensor:
        """Return x with all but k entries per row set to zero."""
        return keep_winners(x, self.k)

    def local_forward(self, x: Tensor) -> Tensor:
        """Return x with all but k entries per row set to zero."""
        return HardTopK.apply(x, self.k)

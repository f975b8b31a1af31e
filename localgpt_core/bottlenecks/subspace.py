"""A frozen subspace: every token is projected onto the same random directions."""

import torch
from torch import Tensor, nn

from localgpt_core.common.modes import wide, without_autocast
from localgpt_core.common.seeds import normal_like
from localgpt_core.common.validation import require_integer

__all__ = ["FrozenSubspace"]


class FrozenSubspace(nn.Module):
    """Project onto a frozen random subspace: h Q Q^T, with Q (d_model x rank) orthonormal.

    Q comes from the QR decomposition of a seeded Gaussian matrix; the gradient is the same projection. Both
    are computed in float32 at least, under autocast too.

    Args:
        d_model: Width of a token.
        rank: Dimension of the subspace.
        seed: Seed of Q; the default gives every block the same subspace.
        dtype: Floating-point type of Q; torch's default where none is given.

    Raises:
        ValueError: Unless 1 <= rank <= d_model.
    """

    def __init__(self, d_model: int, rank: int, seed: int = 42, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        require_integer("d_model", d_model, 1)
        require_integer("rank", rank, 1, d_model)
        like = torch.empty(d_model, rank, dtype=dtype)
        gaussian = normal_like(like, torch.Generator("cpu").manual_seed(seed))
        self.register_buffer("Q", torch.linalg.qr(gaussian).Q.to(like).contiguous())

    def forward(self, h: Tensor) -> Tensor:
        """Return h Q Q^T, shaped like h (..., d_model)."""
        x = wide(h)
        # In this layout, whatever that of Q: it decides how a product is rounded.
        rows = self.Q.T.to(x.dtype).contiguous()
        with without_autocast(x):
            return ((x @ rows.T) @ rows).to(h.dtype)

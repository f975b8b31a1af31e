"""A frozen codebook: every token takes the nearest of its directions."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.bottlenecks.selection import largest
from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import MaybeExact, set_for_a_while, wide, without_autocast
from localgpt_core.common.seeds import normal_like
from localgpt_core.common.validation import require_integer
from localgpt_core.matrices.kmeans import spherical_kmeans

__all__ = ["VQResidualDir", "nearest_codes", "quantised"]

# The state an unseeded torch.Generator starts from, which is what gives every block the same codebook.
UNSEEDED = 67280421310721


def nearest_codes(h: Tensor, codebook: Tensor) -> Tensor:
    """Return argmax_k <h, c_k> (...) for tokens h (..., d_model) and codes (K, d_model).

    The products are taken in float32 at least, under autocast too.
    """
    h = wide(h.detach())
    with without_autocast(h):
        return largest(functional.linear(h, codebook.to(h.dtype)))


class _NearestDirection(LocalFunction):
    """``apply(h, codebook)``: |h| times the nearest code; identity backward."""

    @staticmethod
    def forward(ctx, h: Tensor, codebook: Tensor) -> Tensor:
        codes, x = nearest_codes(h, codebook), wide(h)
        y = codebook[codes].to(x.dtype) * x.norm(dim=-1, keepdim=True)
        return y if y.dtype == h.dtype else y.to(h.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class VQResidualDir(MaybeExact, nn.Module):
    """Replace each token's direction by the nearest of ``n_codes`` frozen ones and keep its norm.

    out = |h| c_k with k = argmax_k <h, c_k>, the code of largest cosine, since all codes have norm 1. The
    backward pass is the identity. A token then takes log2(n_codes) bits and one norm.

    Args:
        d_model: Width of a token.
        n_codes: Number of codes, Gaussian directions of unit norm in the buffer ``codebook``.
        seed: Seed of the codes. None starts every codebook from the same fixed state, so that blocks of the
            same width share one codebook.
        dtype: Floating-point type of the codes; torch's default where none is given.

    Attributes:
        in_use: Whether tokens are quantised; while it is False they pass as they are, and the state_dict
            says so.

    Raises:
        ValueError: If a size is below 1.
    """

    in_use = True

    def __init__(
        self, d_model: int, n_codes: int, seed: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        require_integer("d_model", d_model, 1)
        require_integer("n_codes", n_codes, 1)
        like = torch.empty(n_codes, d_model, dtype=dtype)
        codes = normal_like(like, torch.Generator("cpu").manual_seed(UNSEEDED if seed is None else seed))
        self.register_buffer("codebook", functional.normalize(codes, dim=-1).to(like))

    def codes(self, h: Tensor) -> Tensor:
        """Return the index of the nearest code (...) of each token h (..., d_model)."""
        return nearest_codes(h, self.codebook)

    @torch.no_grad()
    def fit(self, h: Tensor, generator: torch.Generator) -> None:
        """Put the codes at the spherical k-means centres of the directions of the tokens h (..., d_model).

        Raises:
            ValueError: If there are fewer tokens than codes.
        """
        centres = spherical_kmeans(h.flatten(0, -2), len(self.codebook), generator)
        self.codebook.copy_(centres)

    def forward(self, h: Tensor) -> Tensor:
        """Return the quantised tokens, shaped like h (..., d_model)."""
        return super().forward(h) if self.in_use else h

    def exact_forward(self, h: Tensor) -> Tensor:
        """Return |h| c_k."""
        x = wide(h)
        return (self.codebook[self.codes(h)].to(x.dtype) * x.norm(dim=-1, keepdim=True)).to(h.dtype)

    def local_forward(self, h: Tensor) -> Tensor:
        """Return |h| c_k."""
        return _NearestDirection.apply(h, self.codebook)

    # Not a buffer: its value would have to be fetched from the device in every forward pass. Written only
    # where it is False, so that the names of a state_dict are those of the original model.
    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.in_use:
            destination[f"{prefix}in_use"] = torch.tensor(False, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: object) -> None:
        self.in_use = bool(state_dict.pop(f"{prefix}in_use", True))
        super()._load_from_state_dict(state_dict, prefix, *others)


def quantised(model: nn.Module, in_use: bool) -> AbstractContextManager[None]:
    """Switch every codebook of ``model`` on or off inside the ``with`` block."""
    codebooks = (module for module in model.modules() if isinstance(module, VQResidualDir))
    return set_for_a_while(codebooks, "in_use", in_use)

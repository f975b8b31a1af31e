"""What narrows the residual stream: hard top-k, a frozen codebook, a frozen subspace."""

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import MaybeExact, set_for_a_while, wide, without_autocast
from localgpt_core.common.seeds import normal_like
from localgpt_core.common.validation import require_integer
from localgpt_core.layers.kmeans import spherical_kmeans

__all__ = ["FrozenSubspace", "HardTopK", "TopK", "VQResidualDir", "keep_winners", "quantised"]

# The state an unseeded torch.Generator starts from, which is what gives every block the same codebook.
UNSEEDED = 67280421310721

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

# What numpy does is an operator of its own each, opaque to torch.compile; on other devices there are none.


def _numpy(x: Tensor) -> np.ndarray:
    """Return x as an array of a type that numpy has vectorised code for."""
    return (x.float() if x.element_size() < 4 else x).numpy()


@torch.library.custom_op("localgpt::largest", mutates_args=())
def _largest_on_the_cpu(scores: Tensor) -> Tensor:
    return torch.from_numpy(_numpy(scores).argmax(axis=-1, keepdims=True)).squeeze(-1)


_largest_on_the_cpu.register_fake(lambda scores: scores.new_empty(scores.shape[:-1], dtype=torch.long))


def largest(scores: Tensor) -> Tensor:
    """Return the index of the largest entry of ``scores`` in the last dimension, the first one of equals.

    On the CPU numpy finds it twelve times as fast as ``torch.argmax``.
    """
    on_cpu = scores.device.type == "cpu" and scores.numel() > 0
    return _largest_on_the_cpu(scores) if on_cpu else scores.argmax(dim=-1)


def _winners_by_topk(magnitude: Tensor, k: int) -> Tensor:
    winners = magnitude.topk(k, dim=-1, sorted=False).indices
    return magnitude.new_zeros(magnitude.shape, dtype=torch.bool).scatter_(-1, winners, True)


@torch.library.custom_op("localgpt::winners", mutates_args=())
def _winners_on_the_cpu(magnitude: Tensor, k: int) -> Tensor:
    n = magnitude.shape[-1]
    rows = _numpy(magnitude).reshape(-1, n)
    mask = np.greater_equal(rows, np.sort(rows, axis=-1)[:, n - k, None], order="C")
    tied = np.count_nonzero(mask, axis=-1) != k
    if tied.any():
        mask[tied] = _winners_by_topk(torch.from_numpy(rows[tied]), k).numpy()
    return torch.from_numpy(mask).view(magnitude.shape)


# Contiguous, like the kernel's.
_winners_on_the_cpu.register_fake(lambda magnitude, k: magnitude.new_empty(magnitude.shape, dtype=torch.bool))


def winners(magnitude: Tensor, k: int) -> Tensor:
    """Return a mask that is True at exactly k entries of largest ``magnitude`` in the last dimension.

    On the CPU numpy's vectorised sort is eight times as fast as ``torch.topk``. Rows where the k-th place is
    tied (or not a number) go through topk.
    """
    on_cpu = magnitude.device.type == "cpu" and magnitude.numel() > 0
    return _winners_on_the_cpu(magnitude, k) if on_cpu else _winners_by_topk(magnitude, k)


@torch.library.custom_op("localgpt::keep", mutates_args=())
def _keep_on_the_cpu(x: Tensor, mask: Tensor) -> Tensor:
    bits = x.view(INTEGERS[x.element_size()])
    return torch.from_numpy(np.multiply(bits.numpy(), mask.numpy(), order="C")).view(x.dtype)


_keep_on_the_cpu.register_fake(lambda x, mask: x.new_empty(x.shape))
_keep_on_the_cpu.register_autograd(
    lambda ctx, grad_output: (keep(grad_output, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Return x where ``mask`` is True and zero elsewhere, also where x is not finite.

    On the CPU numpy multiplies the bits of x, as integers, by the mask: seven times as fast as torch.where.
    """
    return _keep_on_the_cpu(x, mask) if x.device.type == "cpu" else torch.where(mask, x, 0.0).contiguous()


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

r"""A frozen codebook: every token, or every group of its units, takes the nearest of its codes.

A token h (C) is cut into G groups h_j of d = C / G units, each with K codes of its own: product codes of
G log2 K bits a token (Jegou, Douze and Schmid 2011). With u = h_j / |h_j| and the code c of largest cosine,
|c| = 1,

    forward     r c     r = |h_j| (``"token"``: the norm is kept) or sqrt(d) (``"fixed"``: a token's RMS is 1)

No small change of h_j changes its code: by the true derivative nothing but the norm reaches what lies below,
and with a fixed norm nothing at all. What takes its place, for the gradient g of the group:

    identity    g                               as if nothing had been replaced
    tangent     s (g - <g, u> u)                the derivative of r u, r held constant
    rotation    s (g - 2 <g, w> w + 2 <g, c> u) that of s R h_j, s and R held constant: R turns u into c, and
                                                w is the unit vector along u + c

with s = r / |h_j|, which is 1 where the norm is kept. Where it is fixed, a group counts as no shorter than an
RMS of 10^-3.

By the norm of the group the true derivative is <g, c>, or 0 where the norm is fixed. The identity has <g, u>
there, which is no derivative by it; the tangent has 0, and the rotation (Fifty et al. 2024),
which changes the length of g by s alone, s <g, c>.
"""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.bottlenecks.selection import largest
from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import MaybeExact, narrow, set_for_a_while, wide, without_autocast
from localgpt_core.common.seeds import normal_like
from localgpt_core.common.validation import require, require_choice, require_integer
from localgpt_core.config.allowed import CODE_BACKWARDS, CODE_NORMS
from localgpt_core.matrices.kmeans import spherical_kmeans

__all__ = ["VQResidualDir", "in_groups", "nearest_codes", "quantised"]

# The state an unseeded torch.Generator starts from, which is what gives every block the same codebook.
UNSEEDED = 67280421310721

SHORTEST = 1e-3  # RMS below which a group counts as that long, in the derivative of its normalisation


def in_groups(x: Tensor, codebook: Tensor) -> Tensor:
    """Return x (..., C) as (..., G, d), or as it is where ``codebook`` has one group."""
    return x if codebook.ndim == 2 else x.unflatten(-1, (codebook.shape[0], codebook.shape[-1]))


def nearest_codes(h: Tensor, codebook: Tensor) -> Tensor:
    """Return argmax_k <h, c_k> (...) for tokens h (..., C) and codes (K, C).

    For codes (G, K, d) that of every group, (..., G). The products are taken in float32 at least, under
    autocast too.
    """
    h = in_groups(wide(h.detach()), codebook)
    codes = codebook.to(h.dtype)
    with without_autocast(h):
        products = (
            functional.linear(h, codes) if codes.ndim == 2 else torch.einsum("...gd,gkd->...gk", h, codes)
        )
    return largest(products)


def chosen(codebook: Tensor, codes: Tensor) -> Tensor:
    """Return the code vectors (..., C), or (..., G, d), of the indices that `nearest_codes` returns."""
    if codebook.ndim == 2:
        return codebook[codes]
    return codebook[torch.arange(len(codebook), device=codes.device), codes]


def replaced(h: Tensor, codebook: Tensor, codes: Tensor, rms: str) -> Tensor:
    """Return r c in every group of h (..., C), differentiable by h where r is its norm."""
    x = in_groups(wide(h), codebook)
    size = x.norm(dim=-1, keepdim=True)
    if rms == "fixed":
        # Never of the norm, but a function of h all the same: of derivative zero, and not without one.
        size = torch.where(size < 0, size, math.sqrt(x.shape[-1]))
    # Not a view of the groups, which a Function must not return: nobody could change it in place.
    directions = chosen(codebook, codes).to(x.dtype).reshape(h.shape)
    return narrow(directions * size.expand_as(x).reshape(h.shape), h)


def tangent(g: Tensor, u: Tensor, c: Tensor) -> Tensor:
    """Return g without its part along u."""
    return g - (g * u).sum(dim=-1, keepdim=True) * u


def rotation(g: Tensor, u: Tensor, c: Tensor) -> Tensor:
    """Return R^T g, R = I - 2 w w^T + 2 c u^T with w along u + c; where c = -u, g reflected at u."""
    w = functional.normalize(u + c, dim=-1)
    along_w, along_c = ((g * v).sum(dim=-1, keepdim=True) for v in (w, c))
    return g - 2 * along_w * w + 2 * along_c * u


BACKWARDS = {"tangent": tangent, "rotation": rotation}


class _NearestDirection(LocalFunction):
    """``apply(h, codebook, rms, backward)``: r times the nearest code in every group of h."""

    @staticmethod
    def forward(ctx, h: Tensor, codebook: Tensor, rms: str, backward: str) -> Tensor:
        codes = nearest_codes(h, codebook)
        ctx.rms, ctx.rule = rms, BACKWARDS.get(backward)
        if ctx.rule:
            ctx.save_for_backward(h, codebook, codes)
        return replaced(h, codebook, codes, rms)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.rule is None:
            return grad_output, None, None, None
        h, codebook, codes = ctx.saved_tensors
        x, g = (in_groups(wide(tensor), codebook) for tensor in (h, grad_output))
        grad = ctx.rule(g, functional.normalize(x, dim=-1), chosen(codebook, codes).to(x.dtype))
        if ctx.rms == "fixed":
            size = math.sqrt(x.shape[-1])
            grad = grad * (size / x.norm(dim=-1, keepdim=True).clamp_min(SHORTEST * size))
        return grad.reshape(h.shape).to(grad_output.dtype), None, None, None


class VQResidualDir(MaybeExact, nn.Module):
    """Replace the direction of a token, or of each of its groups, by the nearest of ``n_codes`` frozen ones.

    Args:
        d_model: Width of a token.
        n_codes: Number of codes of a group, Gaussian directions of unit norm in the buffer ``codebook``:
            (n_codes, d_model), or (groups, n_codes, d_model / groups) where there are several groups.
        seed: Seed of the codes. None starts every codebook from the same fixed state, so that blocks of the
            same width share one codebook.
        dtype: Floating-point type of the codes; torch's default where none is given.
        groups: Number of groups of consecutive units.
        rms: The norm of a group: ``"token"`` keeps it, ``"fixed"`` makes it sqrt(d_model / groups).
        backward: What takes the place of the derivative: ``"identity"``, ``"tangent"`` or ``"rotation"``.

    Attributes:
        in_use: Whether tokens are quantised; while it is False they pass as they are, and the state_dict
            says so.

    Raises:
        ValueError: If a size is below 1, the groups are not of one width, or a name is unknown.
    """

    in_use = True

    def __init__(
        self,
        d_model: int,
        n_codes: int,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 1,
        rms: str = "token",
        backward: str = "identity",
    ) -> None:
        super().__init__()
        require_integer("d_model", d_model, 1)
        require_integer("n_codes", n_codes, 1)
        require_integer("groups", groups, 1, d_model)
        require(d_model % groups == 0, "groups", groups, f"must divide d_model={d_model}")
        require_choice("rms", rms, CODE_NORMS)
        require_choice("backward", backward, CODE_BACKWARDS)
        self.rms, self.backward = rms, backward
        shape = (n_codes, d_model) if groups == 1 else (groups, n_codes, d_model // groups)
        like = torch.empty(shape, dtype=dtype)
        codes = normal_like(like, torch.Generator("cpu").manual_seed(UNSEEDED if seed is None else seed))
        self.register_buffer("codebook", functional.normalize(codes, dim=-1).to(like))

    @property
    def n_codes(self) -> int:
        """The number of codes of a group."""
        return self.codebook.shape[-2]

    def codes(self, h: Tensor) -> Tensor:
        """Return the index of the nearest code of each token h (..., d_model): (...), or (..., groups)."""
        return nearest_codes(h, self.codebook)

    @torch.no_grad()
    def fit(self, h: Tensor, generator: torch.Generator) -> None:
        """Put the codes at the spherical k-means centres of the directions of the tokens h (..., d_model).

        Every group has its own, found one after the other.

        Raises:
            ValueError: If there are fewer tokens than codes.
        """
        groups = h.flatten(0, -2).split(self.codebook.shape[-1], dim=-1)
        centres = [spherical_kmeans(rows, self.n_codes, generator) for rows in groups]
        self.codebook.copy_(torch.stack(centres).view_as(self.codebook))

    def forward(self, h: Tensor) -> Tensor:
        """Return the quantised tokens, shaped like h (..., d_model)."""
        return super().forward(h) if self.in_use else h

    def exact_forward(self, h: Tensor) -> Tensor:
        """Return r c."""
        return replaced(h, self.codebook, self.codes(h), self.rms)

    def local_forward(self, h: Tensor) -> Tensor:
        """Return r c."""
        return _NearestDirection.apply(h, self.codebook, self.rms, self.backward)

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

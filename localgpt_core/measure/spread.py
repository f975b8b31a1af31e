r"""Whether one matrix can stand for the Jacobians of all tokens, behind each sublayer of a `LocalGPT`.

With x_t (C) the residual stream of token t at some place and z_t (V) its logits, J_t = dz_t / dx_t (V x C) is
what a feedback matrix would have to be for this token, and the best one for all of N tokens is the mean
J = 1/N sum of J_t. How much of them it is:

    share         |J|_F^2 / (1/N sum of |J_t|_F^2)      1 where all are equal, 1/N where they are orthogonal
    mean cosine   1/N sum of <J_t, J>_F / (|J_t|_F |J|_F)
    head cosine   <J, H>_F / (|J|_F |H|_F)
    head ratio    |J|_F / |H|_F

with H = W diag(gain), the head's weight times the last norm's gain.

J_t is exact, token by token: what a token's stream does to the logits of later ones has no part in it. Behind
a norm J_t has a factor 1 / sigma_t of the token's own. ``normalised`` takes it out, as a feedback point with
a norm does: sigma_t J_t is the derivative with respect to x_t / sigma_t with sigma_t held.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from localgpt_core.common.modes import evaluation_mode, exact_derivatives
from localgpt_core.common.validation import require, require_integer
from localgpt_core.layers.norms import normalise
from localgpt_core.model.gpt import LocalGPT

__all__ = ["JacobianSpread", "jacobian_spread", "spread_of", "token_jacobians"]


@dataclass(frozen=True)
class JacobianSpread:
    """How far the Jacobians of tokens are one matrix, and that matrix the head's; see the module."""

    share: float
    mean_cosine: float
    head_cosine: float
    head_ratio: float


def jacobian_spread(
    model: LocalGPT, idx: Tensor, positions: Sequence[int] | None = None, normalised: bool = False
) -> dict[str, JacobianSpread]:
    """Return the spread of the Jacobians behind each attention and each block, by place.

    Arguments, cost and errors are those of `token_jacobians`. NaN where a norm is zero.
    """
    head = model.output_matrix().detach()
    jacobians = token_jacobians(model, idx, positions, normalised)
    return {place: spread_of(jacobian, head) for place, jacobian in jacobians.items()}


def spread_of(jacobians: Tensor, head: Tensor) -> JacobianSpread:
    """Return the spread of ``jacobians`` (N, V, C), held against ``head`` (V, C)."""
    each, head = jacobians.double(), head.double()
    mean = each.mean(dim=0)
    sizes, size, head_size = each.flatten(1).norm(dim=1), mean.norm(), head.norm()
    return JacobianSpread(
        share=(size.square() / sizes.square().mean()).item(),
        mean_cosine=((each * mean).sum(dim=(1, 2)) / (sizes * size)).mean().item(),
        head_cosine=((mean * head).sum() / (size * head_size)).item(),
        head_ratio=(size / head_size).item(),
    )


def token_jacobians(
    model: LocalGPT, idx: Tensor, positions: Sequence[int] | None = None, normalised: bool = False
) -> dict[str, Tensor]:
    """Return dz_t / dx_t (N, V, C) of the tokens of ``idx`` (B, T) at ``positions``, all without them.

    By place, ``blocks.0.attn`` behind the attention of the first block and ``blocks.0`` behind the block; the
    N = B times positions tokens go by position first. That takes V backward passes a position. The model and
    its ``.grad`` stay as they are.

    Raises:
        ValueError: For a position that is not in the text, or none.
    """
    chosen = range(idx.shape[1]) if positions is None else positions
    require(len(chosen) > 0, "positions", positions, "must be one position or more")
    for position in chosen:
        require_integer("position", position, 0, idx.shape[1] - 1)
    stream: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {}
    with evaluation_mode(model), exact_derivatives(model), torch.enable_grad():
        logits = _logits(model, idx, stream)
        for t in chosen:
            answers = [logits[:, t, v].sum() for v in range(logits.shape[-1])]
            grads = [torch.autograd.grad(z, [*stream.values()], retain_graph=True) for z in answers]
            for (place, x), rows in zip(stream.items(), zip(*grads, strict=True), strict=True):
                jacobian = torch.stack([row[:, t] for row in rows], dim=1)
                if normalised:
                    jacobian = jacobian / normalise(x.detach()[:, t])[1][..., None].to(jacobian)
                found.setdefault(place, []).append(jacobian)
    return {place: torch.cat(jacobians) for place, jacobians in found.items()}


def _logits(model: LocalGPT, idx: Tensor, stream: dict[str, Tensor]) -> Tensor:
    """Return the logits and note the stream by place: what a norm is given, which goes on beside it too."""
    ends = [*[block.ln1 for block in model.blocks[1:]], model.ln_f]

    def differentiable(module: nn.Module, args: tuple, x: Tensor) -> None:
        if not x.requires_grad:  # of frozen embeddings
            x.requires_grad_(True)

    def note(place: str, module: nn.Module, args: tuple) -> None:
        stream[place] = args[0]

    with ExitStack() as hooks:
        hooks.callback(model.tok_emb.register_forward_hook(differentiable).remove)
        for i, (block, end) in enumerate(zip(model.blocks, ends, strict=True)):
            for place, norm in ((f"blocks.{i}.attn", block.ln2), (f"blocks.{i}", end)):
                hooks.callback(norm.register_forward_pre_hook(partial(note, place)).remove)
        return model.logits(idx)

"""The token that comes next: how much of the text it is drawn from, and the draw."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from localgpt_core.common.modes import wide

__all__ = ["WINDOWS", "drawn", "probabilities_of"]


def probabilities_of(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Return the probabilities (B, V) of the next token, those beyond the ``top_k`` largest logits zero."""
    scaled = (logits / temperature).float()
    # Where that overflows, what is left is the distance to the largest, of which softmax knows no more.
    distance = wide(logits) - wide(logits).amax(dim=-1, keepdim=True)
    distance = torch.where(distance == 0, 0.0, distance.double() / temperature)
    overflows = ~scaled.isfinite().all(dim=-1, keepdim=True)
    scaled = torch.where(overflows, distance.float(), scaled)
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(logits < floor, -torch.inf)
    return torch.softmax(scaled, dim=-1)


def drawn(probabilities: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Return one token (B,) per row of ``probabilities`` (B, V)."""
    if not isinstance(generator, Sequence):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    rows = zip(probabilities, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=source) for row, source in rows])


def _half(n: int, block_size: int) -> int:
    """Return the length of the context after n tokens that is cut to its half whenever it is full."""
    half = (block_size + 1) // 2
    return n if n <= block_size else half + (n - block_size - 1) % (block_size - half + 1)


# How many of the n tokens so far the next one is drawn from.
WINDOWS: dict[str, Callable[[int, int], int]] = {"exact": min, "halves": _half}

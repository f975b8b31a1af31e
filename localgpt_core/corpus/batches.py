"""Batches of a split, as pure functions: the training batch of a step, and the whole split in fixed order."""

import numpy as np
import torch

from localgpt_core.common.validation import require, require_integer

__all__ = ["batch", "windows"]


def batch(
    ids: np.ndarray, *, batch_size: int, block_size: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training batch of ``step``: windows drawn uniformly, with replacement.

    With s_1 ... s_B drawn from 0 ... n - T - 1, x[b, t] = ids[s_b + t] and y[b, t] = ids[s_b + t + 1]. The
    draw is a pure function of the arguments: s_b = r_b mod (n - T), where r_1, r_2, ... are the 64-bit
    outputs of Philox4x64-10 (Salmon et al., SC 2011) with key (seed, step), so no generator state has to be
    saved. The modulus favours small s_b by less than one part in 10^12 for n below 10^7.

    Args:
        ids: integers, shape (n,).
        batch_size: B, windows per batch.
        block_size: T, characters per window.
        seed: of the run, at least 0 and below 2^64.
        step: of the run, at least 0 and below 2^64.

    Returns:
        x and y, int64, shape (B, T).

    Raises:
        ValueError: block_size + 1 > n, or an argument out of range.

    """
    _check_block_size(ids, block_size)
    require_integer("batch_size", batch_size, 1)
    require_integer("seed", seed, 0, 2**64 - 1)
    require_integer("step", step, 0, 2**64 - 1)
    # random_raw and not integers: numpy promises the same raw stream for ever, the methods on top may change.
    raw = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
    starts = (raw % np.uint64(len(ids) - block_size)).astype(np.int64)
    drawn = torch.from_numpy(ids[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def windows(
    ids: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all of ``ids`` in order, cut into windows that do not overlap, for an exact evaluation.

    Every integer but the first is a target exactly once: in ``y``, or in ``y_rest``, the r = (n - 1) mod T
    targets that do not fill a window.

    Args:
        ids: integers, shape (n,).
        block_size: T, characters per window.

    Returns:
        x, y of shape ((n - 1) // T, T) and x_rest, y_rest of shape (1, r), int64; r may be 0.

    Raises:
        ValueError: block_size + 1 > n, or block_size < 1.

    """
    _check_block_size(ids, block_size)
    whole = torch.from_numpy(np.asarray(ids).astype(np.int64))
    x, y = whole[:-1], whole[1:]
    full = len(x) // block_size * block_size
    return (
        x[:full].view(-1, block_size),
        y[:full].view(-1, block_size),
        x[full:].view(1, -1),
        y[full:].view(1, -1),
    )


def _check_block_size(ids: np.ndarray, block_size: int) -> None:
    require_integer("block_size", block_size, 1)
    require(
        block_size + 1 <= len(ids),
        "block_size",
        block_size,
        f"a window of {block_size + 1} characters does not fit into {len(ids)}",
    )

"""Batches of a split, as pure functions: the training batch of a step, and the whole split in fixed order.

Windows begin anywhere in a text. Where it is made of sequences (`localgpt_core.corpus.sequences`), they are
these, and a target that is no answer does not count.

A run keeps its text where its model is (`resident`) and gathers its batches there (`Batches`). All that is
brought there are the places of the batches to come, every few hundred steps.
"""

import numpy as np
import torch
from torch import Tensor

from localgpt_core.common.validation import require, require_integer
from localgpt_core.corpus.sequences import Sequences

__all__ = ["Batches", "batch", "resident", "windows"]

AHEAD = 256  # steps whose places in the text are drawn at one time


def batch(
    ids: np.ndarray,
    *,
    batch_size: int,
    block_size: int,
    seed: int,
    step: int,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the training batch of ``step``: windows drawn uniformly, with replacement.

    With s_1 ... s_B drawn from 0 ... n - T - 1, x[b, t] = ids[s_b + t] and y[b, t] = ids[s_b + t + 1]. The
    draw is a pure function of the arguments: s_b = r_b mod (n - T), where r_1, r_2, ... are the 64-bit
    outputs of Philox4x64-10 (Salmon et al., SC 2011) with key (seed, step), so no generator state has to be
    saved. The modulus favours small s_b by less than one part in 10^12 for n below 10^7.

    Of a text of m sequences of P = T + 1 characters, s_b = P (r_b mod m), and y[b, t] is `IGNORED` unless
    t + 1 is the place of an answer.

    Args:
        ids: integers, shape (n,).
        batch_size: B, windows per batch.
        block_size: T, characters per window.
        seed: of the run, at least 0 and below 2^64.
        step: of the run, at least 0 and below 2^64.
        sequences: those that ``ids`` is made of; None for a text that windows may begin anywhere in.

    Returns:
        x and y, int64, shape (B, T).

    Raises:
        ValueError: block_size + 1 > n, windows that are no sequences, or an argument out of range.

    """
    _check_sizes(ids, batch_size, block_size, seed, sequences)
    require_integer("step", step, 0, 2**64 - 1)
    apart = sequences.period if sequences else 1
    starts = apart * _starts((len(ids) - block_size - 1) // apart + 1, batch_size, seed, step)
    drawn = torch.from_numpy(ids[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    x, y = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    return x, sequences.counted(y) if sequences else y


class Batches:
    """All training batches of a split on ``device``: ``batches(step)`` is `batch` of that step, bit for bit.

    Raises:
        ValueError: block_size + 1 > n, windows that are no sequences, or an argument out of range.

    """

    def __init__(
        self,
        ids: np.ndarray,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        sequences: Sequences | None = None,
    ) -> None:
        _check_sizes(ids, batch_size, block_size, seed, sequences)
        text, apart = resident(ids, device), sequences.period if sequences else 1
        # Views: row s of the first is the text from the s-th place on at which a window may begin, of the
        # second from the place after it on, T characters each.
        self._x, self._y = (part.unfold(0, block_size, apart) for part in (text[:-1], text[1:]))
        self._sequences = sequences
        self._sizes = (len(self._x), batch_size, seed)
        self._round = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of ``step``, int64, shape (B, T)."""
        round_, place = divmod(step, AHEAD)
        if round_ != self._round:
            steps = range(round_ * AHEAD, (round_ + 1) * AHEAD)
            starts = np.stack([_starts(*self._sizes, step) for step in steps])
            self._starts, self._round = torch.from_numpy(starts).to(self._x.device), round_
        starts = self._starts[place]
        x, y = self._x[starts].long(), self._y[starts].long()
        return x, self._sequences.counted(y) if self._sequences else y


def resident(ids: np.ndarray, device: torch.device | str) -> Tensor:
    """Return a copy of ``ids``, shape (n,), on ``device``, as uint8 if it is that already, else as int32."""
    kind = np.uint8 if ids.dtype == np.uint8 else np.int32
    return torch.from_numpy(ids.astype(kind)).to(device)


def windows(
    ids: np.ndarray | Tensor, block_size: int, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all of ``ids`` in order, cut into windows that do not overlap, for an exact evaluation.

    Every integer but the first is a target exactly once: in ``y``, or in ``y_rest``, the r = (n - 1) mod T
    targets that do not fill a window. Of a text of m sequences the windows are these, m in all, r is 0, and
    what is no answer is `IGNORED` in ``y``.

    Args:
        ids: integers, shape (n,).
        block_size: T, characters per window.
        sequences: those that ``ids`` is made of, if it is.

    Returns:
        x, y of shape ((n - 1) // T, T) and x_rest, y_rest of shape (1, r), int64; r may be 0. They are where
        ``ids`` is, on the CPU for an array.

    Raises:
        ValueError: block_size + 1 > n, block_size < 1, or windows that are no sequences.

    """
    _check_block_size(ids, block_size, sequences)
    whole = ids.long() if isinstance(ids, Tensor) else torch.from_numpy(np.asarray(ids).astype(np.int64))
    if sequences:
        rows = whole.view(-1, sequences.period)
        return rows[:, :-1], sequences.counted(rows[:, 1:]), *whole[:0].view(2, 1, 0)
    x, y = whole[:-1], whole[1:]
    full = len(x) // block_size * block_size
    return (
        x[:full].view(-1, block_size),
        y[:full].view(-1, block_size),
        x[full:].view(1, -1),
        y[full:].view(1, -1),
    )


def _starts(places: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return where the windows of ``step`` begin, each at one of ``places``."""
    # random_raw and not integers: numpy promises the same raw stream for ever, the methods on top may change.
    raw = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
    return (raw % np.uint64(places)).astype(np.int64)


def _check_sizes(
    ids: np.ndarray, batch_size: int, block_size: int, seed: int, sequences: Sequences | None
) -> None:
    _check_block_size(ids, block_size, sequences)
    require_integer("batch_size", batch_size, 1)
    require_integer("seed", seed, 0, 2**64 - 1)


def _check_block_size(ids: np.ndarray | Tensor, block_size: int, sequences: Sequences | None) -> None:
    require_integer("block_size", block_size, 1)
    if sequences:
        sequences.require_fit(block_size, len(ids))
    require(
        block_size + 1 <= len(ids),
        "block_size",
        block_size,
        f"a window of {block_size + 1} characters does not fit into {len(ids)}",
    )

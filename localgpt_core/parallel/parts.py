r"""The parts of a batch: on each of R processes A of them, one after the other, P = R A in all.

Of n rows part i has those from floor(i n / P) up to floor((i + 1) n / P), and process r the parts r A to
r A + A - 1. The loss of a part weighs as much as its share of the targets that count,

    loss = sum over parts of (n_i / n) loss_i,

so that the error of every token, and all that is linear in it, is that of the whole batch.

Whatever is drawn for a row is drawn for the whole batch, from the same key, and the row taken out of it: the
numbers are those of one process with one part. That takes the memory of one layer's draw for the whole batch,
and its time once per part; the rejected alternative, a key for every row, would change every run there is.
The exception is a GPU's kernel of softmax attention, which draws its masks inside: there a run in parts drops
other attention weights than one in one piece, the same in any number of parts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from localgpt_core.common.validation import require
from localgpt_core.parallel.processes import ALONE, Processes

__all__ = ["WHOLE", "DropsOut", "Part", "Split"]


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a batch.

    Attributes:
        rows: Which.
        of: Rows of the batch.
        places: Their numbers, where the batch is; None for all. A tensor, so that a compiled model serves
            all parts.
    """

    rows: slice
    of: int
    places: Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows."""
        return self.rows == slice(0, self.of)


@dataclass(frozen=True)
class Split:
    """How a batch is cut.

    Attributes:
        processes: Those that make the run.
        accumulate: Parts that each of them takes one after the other.
    """

    processes: Processes = ALONE
    accumulate: int = 1

    @property
    def count(self) -> int:
        """The number of parts."""
        return self.processes.count * self.accumulate

    def parts(self, rows: int, device: torch.device | str = "cpu") -> Iterator[Part]:
        """Yield the parts of this process of a batch of ``rows`` rows that is on ``device``."""
        first = self.processes.rank * self.accumulate
        for i in range(first, first + self.accumulate):
            begin, end = i * rows // self.count, (i + 1) * rows // self.count
            places = torch.arange(begin, end, device=device) if self.count > 1 else None
            yield Part(slice(begin, end), rows, places)

    def one_after_the_other(self) -> "Split":
        """Return the same parts in this process alone."""
        return Split(ALONE, self.count)

    def require_fits(self, batch_size: int) -> None:
        """Raise ``ValueError`` unless all parts of a batch have the same number of rows."""
        parts = f"{self.processes.count} processes with accumulate={self.accumulate}"
        allowed = f"must be a multiple of {self.count}, for {parts}"
        require(batch_size % self.count == 0, "batch_size", batch_size, allowed)

    def total(self, rows: int, of_part: Callable[[Part], dict], device: torch.device | str) -> dict:
        """Return by key the sum over all parts of the tensors that ``of_part`` returns."""
        sums: dict = {}
        for part in self.parts(rows, device):
            found = of_part(part)
            sums = {key: sums[key] + tensor if sums else tensor for key, tensor in found.items()}
        self.processes.add_up(list(sums.values()))
        return sums

    def gathered(self, rows: int, of_part: Callable[[Part], dict], device: torch.device | str) -> dict:
        """Return by key the rows of all parts, of each of which ``of_part`` returns its own."""
        parts = [(part, of_part(part)) for part in self.parts(rows, device)]
        if len(parts) == self.count == 1:
            return parts[0][1]
        whole = {key: own.new_zeros(rows, *own.shape[1:]) for key, own in parts[0][1].items()}
        for part, found in parts:
            for key, own in found.items():
                whole[key][part.rows] = own
        self.processes.add_up(list(whole.values()))
        return whole


WHOLE = Split()


class DropsOut:
    """A mixin for a module whose ``config`` says which share of its values drops out in training.

    Attributes:
        part: The part of the batch that the module sees, None for the whole.
    """

    part: Part | None = None

    def dropout(self, x: Tensor) -> Tensor:
        """Return ``x`` (rows, ...) after dropout; of a part with the mask that its rows have in the whole."""
        share = self.config.dropout
        if share == 0 or not self.training or self.part is None:
            return functional.dropout(x, share, self.training)
        ones = x.new_ones(self.part.of, *x.shape[1:])
        return x * functional.dropout(ones, share)[self.part.places]

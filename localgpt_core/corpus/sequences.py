"""Texts that are sequences of one length, some of whose characters are answers: a loss counts these alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from localgpt_core.common.validation import require, require_integer

__all__ = ["IGNORED", "Sequences"]

IGNORED = -100  # the target of a position whose loss does not count


@dataclass(frozen=True)
class Sequences:
    """How a text is cut into sequences, each of which is one window, and which of their characters count.

    Attributes:
        period: P, characters of a sequence. The context of a model is P - 1: its last target is a
            sequence's last character.
        answers: the places of the answers in a sequence, counted from 0, in order; none is at 0, as nothing
            predicts a sequence's first character.
        chance: the share of the answers that who reads nothing but the alphabet and the answers so far gets
            right at best.
        guess: the mean loss of that guess, in nats per answer.

    Raises:
        ValueError: answers that are out of order or outside a sequence, or none.

    """

    period: int
    answers: tuple[int, ...]
    chance: float
    guess: float

    def __post_init__(self) -> None:
        require_integer("period", self.period, 2)
        canonical = tuple(sorted({*self.answers} & {*range(1, self.period)}))
        allowed = f"must be ascending places from 1 to {self.period - 1}, and at least one"
        require(len(canonical) > 0 and self.answers == canonical, "answers", self.answers, allowed)

    def require_fit(self, block_size: int, characters: int) -> None:
        """Raise ``ValueError`` unless a window is a sequence and ``characters`` are whole sequences."""
        allowed = f"must be {self.period - 1}: a window is a sequence of {self.period} characters"
        require(block_size == self.period - 1, "block_size", block_size, allowed)
        whole = characters > 0 and characters % self.period == 0
        require(whole, "characters", characters, f"must be whole sequences of {self.period}")

    def counted(self, targets: Tensor) -> Tensor:
        """Return ``targets`` (..., P - 1) of whole sequences, with `IGNORED` where no answer stands."""
        other = torch.ones(self.period - 1, dtype=torch.bool)
        other[[place - 1 for place in self.answers]] = False
        return targets.masked_fill(other.to(targets.device), IGNORED)

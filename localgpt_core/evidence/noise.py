r"""What another rounding alone does to a run: the floor below which a difference says nothing.

A stream that is turned into a basis of all its dimensions and back is the same stream in exact arithmetic.
Two runs that differ in that only (``subspace_rank`` 0 and ``n_embd``) are therefore the same run, rounded
otherwise, and training amplifies the difference. Of N such pairs with differences d_i in final loss

    s = sqrt(sum_i d_i^2 / N),    floor(n) = t_{0.975, N} s / sqrt(n),

as the mean of the d_i is known to be zero: in 95 of 100 cases the mean of n pairs lies below the floor if the
two arms are one and the same rule.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from scipy.special import stdtrit

from localgpt_core.records import RunRecord

__all__ = ["Noise", "ends", "rounding_noise"]


@dataclass(frozen=True)
class Noise:
    """How far two runs of one and the same rule end apart.

    Attributes:
        spread: s, in nats per character.
        pairs: N, the pairs of runs that it was measured on.
    """

    spread: float
    pairs: int

    def floor(self, n: int) -> float:
        """Return below what the mean difference of ``n`` pairs says nothing; NaN without a pair."""
        return float(stdtrit(self.pairs, 0.975)) * self.spread / math.sqrt(n) if n else math.nan


def rounding_noise(records: Iterable[RunRecord]) -> Noise | None:
    """Return the noise of rounding, from all pairs that show it; None below two pairs.

    ``records`` are of one kind of device.
    """
    finished = {}
    for record in records:
        if record.status == "finished":
            finished.setdefault(record.run_spec, record.final_val_loss)
    differences = []
    for spec, loss in finished.items():
        model = spec.model
        if model.subspace_rank == model.n_embd and model.subspace_mode == "project":
            plain = replace(spec, model=replace(model, subspace_rank=0))
            if plain in finished:
                differences.append(loss - finished[plain])
    if len(differences) < 2:
        return None
    return Noise(math.sqrt(math.fsum(d * d for d in differences) / len(differences)), len(differences))


def ends(mean: float, half: float, floor: float) -> str:
    """Return where an arm ends whose paired difference has the interval ``mean`` plus and minus ``half``.

    ``"not clearly apart"`` if the interval contains zero. Else, as it lies wholly on one side of zero,
    ``"open"`` if rounding alone may do that, which is up to ``floor``; ``"below"`` or ``"above"`` beyond it.
    """
    if abs(mean) <= half:
        return "not clearly apart"
    return "open" if abs(mean) <= floor else "below" if mean < 0 else "above"

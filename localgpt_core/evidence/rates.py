"""The learning rates that were tried of one setting, and whether the best of them is inside their grid."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from localgpt_core.records import RunRecord
from localgpt_core.records.specs import RunSpec

__all__ = ["Search", "search_of"]


@dataclass(frozen=True)
class Search:
    """The runs that differ in their learning rate and their seed alone.

    Attributes:
        losses: Final loss in nats per character by seed and rate, infinite for a run that diverged.
    """

    losses: dict[int, dict[float, float]]

    def best(self, seed: int) -> float:
        """Return the rate of the lowest final loss of ``seed``; ``KeyError`` if it has no run."""
        return min(self.losses[seed], key=self.losses[seed].get)

    def inside(self, seed: int) -> bool:
        """Return whether of ``seed`` a smaller and a larger rate than the best one were tried."""
        tried = self.losses.get(seed)
        return bool(tried) and min(tried) < self.best(seed) < max(tried)

    @property
    def searched(self) -> list[int]:
        """The seeds of which at least three rates were tried."""
        return sorted(seed for seed, tried in self.losses.items() if len(tried) > 2)


def search_of(spec: RunSpec, records: Iterable[RunRecord]) -> Search:
    """Return the runs of ``spec`` at any learning rate and of any seed, of records of one kind of device.

    How often and on what a run was evaluated on its way does not matter: its last evaluation is the same.
    """
    losses: dict[int, dict[float, float]] = {}
    for record in sorted(records, key=lambda record: record.digest):
        own = record.run_spec
        if _setting(own) == _setting(spec):
            loss = record.final_val_loss if record.status == "finished" else float("inf")
            losses.setdefault(own.train.seed, {}).setdefault(own.train.lr, loss)
    return Search({seed: dict(sorted(tried.items())) for seed, tried in sorted(losses.items())})


def _setting(spec: RunSpec) -> RunSpec:
    """Return ``spec`` with everything equal that a search of rates leaves open or that changes no step."""
    train = replace(spec.train, seed=0, lr=1.0, eval_between=0, eval_interval=spec.train.steps)
    return replace(spec, train=train)

"""The learning rates that were tried of one setting, and whether the best of them is inside their grid."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from localgpt_core.records import RunRecord
from localgpt_core.records.specs import RunSpec

__all__ = ["RatesTried", "rates_by_setting", "setting_of"]


@dataclass(frozen=True)
class RatesTried:
    """The runs that differ in their learning rate and their seed alone, whichever suites made them.

    Attributes:
        losses: Final loss in nats per character by seed and rate, infinite for a run that did not finish.
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


def setting_of(spec: RunSpec) -> RunSpec:
    """Return ``spec`` without what a search of rates leaves open: rate, seed, evaluations on the way.

    How often and on what a run was evaluated before its end does not matter: its last evaluation is the same.
    """
    train = replace(spec.train, seed=0, lr=1.0, eval_between=0, eval_interval=spec.train.steps)
    return replace(spec, train=train)


def rates_by_setting(records: Iterable[RunRecord]) -> dict[RunSpec, RatesTried]:
    """Return the rates that ``records``, of one kind of device, have tried of each setting."""
    losses: dict[RunSpec, dict[int, dict[float, float]]] = {}
    for record in sorted(records, key=lambda record: record.digest):
        train = record.run_spec.train
        loss = record.final_val_loss if record.status == "finished" else float("inf")
        by_seed = losses.setdefault(setting_of(record.run_spec), {})
        by_seed.setdefault(train.seed, {}).setdefault(train.lr, loss)
    return {
        setting: RatesTried({seed: dict(sorted(tried.items())) for seed, tried in sorted(own.items())})
        for setting, own in losses.items()
    }

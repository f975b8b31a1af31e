"""Which suites a campaign makes, in which order, and where their learning rates come from.

A ranking is a TOML file; its suites lie in the folder ``suites`` beside it:

    [[stages]]
    suite = "gpu-rates"

    [[stages]]
    suite = "gpu"
    arms = ["bp softmax", "fa"]         # optional: these arms, in this order
    seeds = [1]                         # optional, instead of the suite's; so is
    diagnose_every = 2500               # steps between comparisons with the exact gradient
    rates = "gpu-rates"                 # optional: a suite that is a search, see `Search`
    rate_of = "bp softmax"              # optional: whose rate in the search, instead of each arm's own

    [[stages]]
    suite = "gpu"
    bench = 20                          # times the arms' steps in so many pairs, and trains nothing

Unknown keys are errors.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from localgpt_core.common.validation import require, require_integer
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.experiments.suites import Arm, Suite, read_seeds, read_suite, read_toml, require_keys
from localgpt_core.records import RunRecord

__all__ = ["Search", "Stage", "best_rate", "read_ranking"]

KEYS = {"suite", "arms", "seeds", "diagnose_every", "rates", "rate_of", "bench"}


@dataclass(frozen=True)
class Search:
    """A suite that tries learning rates: the arm ``"fa 3e-4"`` tries 3e-4 for ``"fa"``.

    Attributes:
        suite: The suite.
        arms: Its arms by the name without the rate, and the rate.
    """

    suite: Suite
    arms: dict[str, dict[float, Arm]]

    @classmethod
    def of(cls, suite: Suite) -> "Search":
        """Return the search of a suite; ``ValueError`` for an arm whose name does not end with its rate."""
        arms: dict[str, dict[float, Arm]] = {}
        for arm in suite.arms:
            name, _, rate = arm.name.rpartition(" ")
            lr = arm.train.get("lr")
            valid = False
            with suppress(ValueError):
                valid = name != "" and float(rate) == lr
            require(valid, f"suite {suite.path}: arm", arm.name, f"must end with its rate, here lr={lr!r}")
            arms.setdefault(name, {})[lr] = arm
        return cls(suite, arms)

    def losses(
        self, name: str, records: dict[str, RunRecord], corpus: Corpus, preset: str | None, device_type: str
    ) -> dict[float, float | None]:
        """Return the mean final loss at each rate of ``name``, by rate; None unless all its runs finished.

        Runs that were made on another kind of device do not count.
        """
        found: dict[float, float | None] = {}
        for lr, arm in sorted(self.arms[name].items()):
            runs = replace(self.suite, arms=(arm,)).plan(corpus, preset)
            own = [records[run.spec.digest] for run in runs if run.spec.digest in records]
            done = [r for r in own if r.status == "finished" and r.device_type == device_type]
            found[lr] = fmean(r.final_val_loss for r in done) if len(done) == len(runs) else None
        return found


def best_rate(losses: dict[float, float | None]) -> tuple[float | None, str]:
    """Return the rate with the lowest loss, None without any, and the search in words.

    A rate without a loss never wins, of equal losses the smaller rate does; that, a rate without a loss and a
    winner at the edge of the grid are said.
    """
    shown = ", ".join(f"{lr:g} {'-' if loss is None else f'{loss:.4f}'}" for lr, loss in losses.items())
    known = [(loss, lr) for lr, loss in losses.items() if loss is not None]
    if not known:
        return None, f"{shown}: none has a loss"
    lowest, best = min(known)
    remarks = [f"best {best:g}"]
    if len([loss for loss, _ in known if loss == lowest]) > 1:
        remarks.append("a tie")
    if best in (min(losses), max(losses)):
        remarks.append("at the edge of the grid")
    if len(known) < len(losses):
        remarks.append(f"{len(losses) - len(known)} without a loss")
    return best, f"{shown}: {', '.join(remarks)}"


@dataclass(frozen=True)
class Stage:
    """One entry of a ranking: the part of a suite that it makes, and where its learning rates come from."""

    suite: Suite
    search: Search | None = None
    rate_of: str | None = None
    bench: int = 0


def read_ranking(path: str | os.PathLike[str]) -> tuple[Stage, ...]:
    """Return the stages of a ranking.

    Raises:
        ValueError: If the file or a suite that it names is missing or malformed, for an unknown key or arm,
            and for an arm of which its search knows nothing.
    """
    path = Path(path)
    content = read_toml("ranking", path)
    require_keys(f"ranking {path}: key", content, {"stages"}, {"stages"})
    found = content["stages"]
    require(isinstance(found, list) and found, f"ranking {path}: stages", found, "must be tables [[stages]]")
    return tuple(_stage(path, number, entry) for number, entry in enumerate(found, start=1))


def _stage(path: Path, number: int, entry: dict[str, Any]) -> Stage:
    where = f"ranking {path}, stage {number}"
    require_keys(f"{where}: key", entry, KEYS, {"suite"})
    suite = _suite(path, f"{where}: suite", entry["suite"])
    arms = {arm.name: arm for arm in suite.arms}
    names = entry.get("arms", [*arms])
    require(isinstance(names, list) and names, f"{where}: arms", names, "must be a list of names of arms")
    for name in names:
        require(name in [*arms], f"{where}: arm", name, "allowed are " + ", ".join(arms))
    changes: dict[str, Any] = {}
    if "seeds" in entry:
        changes["seeds"] = read_seeds(f"{where}: seeds", entry["seeds"])
    for key, least in (("diagnose_every", 0), ("bench", 1)):
        if key in entry:
            require_integer(f"{where}: {key}", entry[key], least)
            changes[key] = entry[key]
    bench = changes.pop("bench", 0)
    suite = replace(suite, arms=tuple(replace(arms[name], **changes) for name in dict.fromkeys(names)))
    if "rates" not in entry:
        require(
            "rate_of" not in entry, f"{where}: rate_of", entry.get("rate_of"), "is of no use without rates"
        )
        return Stage(suite, bench=bench)
    search = Search.of(_suite(path, f"{where}: rates", entry["rates"]))
    rate_of = entry.get("rate_of")
    for name in names if rate_of is None else [rate_of]:
        allowed = f"suite {search.suite.name} searches " + ", ".join(search.arms)
        require(name in [*search.arms], f"{where}: rate_of", name, allowed)
        same = rate_of is not None or all(arms[name].model == own.model for own in search.arms[name].values())
        require(same, f"{where}: arm", name, f"has other fields in suite {search.suite.name}")
    return Stage(suite, search, rate_of, bench)


def _suite(path: Path, where: str, name: Any) -> Suite:
    require(isinstance(name, str), where, name, "must be the name of a suite")
    return read_suite(path.parent / "suites" / f"{name}.toml")

"""What of a run goes to its tracker: the points of its curves, its rate, the numbers of its diagnostics."""

from typing import Any

from localgpt_core.measure.diagnostics import measured_values
from localgpt_core.tracking.tracker import Tracker

__all__ = ["RunLog"]

State = Any  # a `RunState`, whose room imports this one


class RunLog:
    """Logs what ``run`` has measured last, under the names that its record has.

    ``tokens_per_s`` are the training tokens since the point before over the time of their steps. A quantity
    of the diagnostics with several places has a name for each, such as ``cosine/head.weight``.
    """

    def __init__(self, tracker: Tracker, run: State) -> None:
        self.tracker, self.run = tracker, run
        self.step, self.train_time_s = run.step, run.train_time_s

    def point(self) -> None:
        """Log the point of the training curve that has just been added."""
        run = self.run
        tokens = (run.step - self.step) * run.config.batch_size * run.model.config.block_size
        seconds = run.train_time_s - self.train_time_s
        self.step, self.train_time_s = run.step, run.train_time_s
        values = {name: run.curves[name][-1] for name in ("train_loss", "lr")}
        self.tracker.log(run.step, values | {"tokens_per_s": tokens / seconds})

    def evaluation(self) -> None:
        """Log the evaluation that has just been made."""
        curves = {name: curve for name, curve in self.run.curves.items() if name.startswith("val_")}
        del curves["val_step"]
        self.tracker.log(self.run.step, {name: curve[-1] for name, curve in curves.items()})

    def diagnosis(self) -> None:
        """Log the numbers that were measured at this step, if that has worked."""
        diagnostics, values = self.run.diagnostics, {}
        for quantity in diagnostics.keys() - {"step"}:
            for step, place, value in measured_values(diagnostics, quantity):
                if step == self.run.step and value is not None:
                    values[f"{quantity}/{place}" if place else quantity] = value
        if values:
            self.tracker.log(self.run.step, values)

"""TensorBoard: a folder of event files for every run.

A run that goes on gets a further file in its folder, which says from which step on the earlier ones are to be
forgotten (``purge_step``); so does one that starts again. Hyperparameters go into the same file as the
curves, for the page "HParams", where `SummaryWriter.add_hparams` would open a run of its own for them.
"""

import re
from pathlib import Path

from localgpt_core.common.files import require_writable
from localgpt_core.tracking.tracker import TrackedRun

__all__ = ["TensorBoard"]

LONGEST_NAME = 200  # bytes; systems allow 255


class TensorBoard:
    """Writes below ``folder`` what ``tensorboard --logdir FOLDER`` shows; values are kept in float32.

    Raises:
        ImportError: Without the package ``tensorboard``.
        ValueError: If nothing can be written there.
    """

    def __init__(self, folder: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.open = Path(folder), SummaryWriter
        require_writable("track", self.folder / "events")

    def place(self, run: TrackedRun) -> Path:
        """Return the folder of ``run``: its name, without what a folder cannot be called."""
        name = re.sub(r"[^\w.+=-]+", "-", run.name).encode()[-LONGEST_NAME:].decode(errors="ignore")
        return self.folder / name

    def start(self, run: TrackedRun) -> None:
        """Open a file for ``run`` and write its hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        first = 0 if run.step is None else run.step + 1
        self.writer = self.open(self.place(run), purge_step=first)
        for summary in hparams(run.config, {"val_loss": None}):
            self.writer.file_writer.add_summary(summary)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a point to the curve of each name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, status: str) -> None:
        """Note the status and close the file."""
        self.writer.add_text("status", status)
        self.writer.close()

    def __str__(self) -> str:
        return f"tensorboard:{self.folder}"

"""A run between two steps: how it is advanced, measured, saved, restored and summed up."""

import copy
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localgpt_core.config import CODEBOOK_BATCHES, LocalGPTConfig, TrainConfig
from localgpt_core.config.schedule import anchors_in
from localgpt_core.corpus.batches import Batches, resident, windows
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.measure.cost import peak_memory_mib, reset_peak_memory
from localgpt_core.measure.diagnostics import Diagnostics, measure_into
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.parallel.parts import WHOLE, Split
from localgpt_core.training.before import check_compiled, planned_flops, train_on_noise
from localgpt_core.training.checkpoints import Checkpoint, save_checkpoint
from localgpt_core.training.curves import Curves, add_point, as_the_last, curve_interval, no_points
from localgpt_core.training.step import build_model, build_optimizer, compiled, evaluation, training_step

__all__ = ["RunState", "TrainResult"]

DIAGNOSED_WINDOWS = 128  # of the validation split, for what needs many tokens


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        model: The trained model, on its device.
        status: ``"finished"``; ``"diverged"``: a loss was not finite; ``"interrupted"``: stopped by Ctrl-C;
            ``"out_of_time"``: it did not, or could not, finish before the deadline.
        steps_done: Steps taken, and those that ``anchor_only`` skipped.
        curves: ``step``, ``tokens``, ``lr`` and ``train_loss`` (mean since the previous point), and
            ``val_step`` and ``val_loss`` on the validation split, or of it what ``eval_between`` and
            ``eval_iters`` say; nats per character. Of a corpus with answers they are nats per answer, and
            ``val_accuracy`` is the share that is right.
        best_val_loss: The lowest validation loss of the evaluations that are as the last one is: of all, or
            with ``eval_between`` that of the last one alone. NaN if none of them was finite.
        wall_time_s: Seconds in all, over every part of a resumed run.
        tokens_per_s: Training tokens per second, evaluation apart.
        peak_memory_mib: `localgpt_core.measure.peak_memory_mib` since the run, or its resumed part, began.
        flops_per_token: Matmul FLOPs of all training, divided by its tokens: every step of the run as
            planned, noise and alignment of the feedback before the first one, and a fit of codes. A step
            that ``anchor_only`` skips is the forward pass of its loss.
        anchor_steps: How many of the steps were anchors.
        diagnostics: What the rule did over training, see `localgpt_core.measure`; empty unless asked for.
        interrupted: Whether Ctrl-C was pressed, be it too late to stop this run.
    """

    model: LocalGPT
    status: str
    steps_done: int
    curves: Curves
    best_val_loss: float
    wall_time_s: float
    tokens_per_s: float
    peak_memory_mib: float
    flops_per_token: float
    anchor_steps: int
    diagnostics: Diagnostics
    interrupted: bool = False

    @property
    def final_val_loss(self) -> float:
        """Validation loss after the last step; NaN unless the run finished."""
        return self.curves["val_loss"][-1] if self.status == "finished" else math.nan


class RunState:
    """The state of a run between two steps, and how it is advanced, measured and saved.

    It starts at step 0, with the noise, the alignment of the feedback and the fit of the codes that the
    configuration asks for, or takes over the state of ``checkpoint``, in which they are done. ``split`` says
    which share of every batch this process takes; what the others add comes in at each step.

    Raises:
        ValueError: If the checkpoint belongs to another run.
    """

    def __init__(
        self,
        model_config: LocalGPTConfig,
        config: TrainConfig,
        corpus: Corpus,
        device: torch.device,
        diagnose_every: int = 0,
        checkpoint: Checkpoint | None = None,
        split: Split = WHOLE,
    ) -> None:
        self.config, self.corpus, self.device, self.split = config, corpus, device, split
        self.diagnose_every = diagnose_every
        self.diagnostics: Diagnostics = {}
        self.model = build_model(model_config, config, device)
        self.optimizer = build_optimizer(self.model, config)
        sizes = {"batch_size": config.batch_size, "block_size": model_config.block_size, "seed": config.seed}
        self.batches = Batches(corpus.train, **sizes, device=device, sequences=corpus.sequences)
        self.val = resident(corpus.val, device)
        self.step = 0
        self.curves: Curves = no_points(corpus.sequences is not None)
        self.losses: list[float] = []
        self.pending: list[Tensor] = []
        self.train_time_s = 0.0
        self.earlier_s = 0.0
        self.started = time.perf_counter()
        flops = 0 if split.processes.rank else planned_flops(self.model, config, *self.batch(0), split)
        self.flops_per_token = flops / (config.steps * config.batch_size * model_config.block_size)
        self.stepped = self.model
        if config.compile:
            torch.compiler.reset()
            self.stepped = compiled(self.model, replayed=split.accumulate == 1)
            rows = next(split.one_after_the_other().parts(config.batch_size)).rows
            check_compiled(self.model, self.stepped, config, *(ids[rows] for ids in self.batch(0)))
        reset_peak_memory(device)  # neither the count of FLOPs, on a copy, nor the check is part of the run
        if checkpoint is None:
            self._start()
        else:
            self._restore(checkpoint)

    def _start(self) -> None:
        """Do what comes before the first step."""
        if self.config.noise_start:
            train_on_noise(self.model, self.stepped, self.config, self.device, self.split)
        for i in range(self.model.config.fa_grape_start):
            self.model.align_feedback(self.config.seed, "start", i, idx=self.batch(i)[0], split=self.split)
        self._quantise_when_due()

    def _quantise_when_due(self) -> None:
        """Switch the codebooks off before their first step, and fit them there if they are to be fitted."""
        self.model.quantise(self.step >= self.config.vq_start)
        if self.model.config.vq_init == "kmeans" and self.step == self.config.vq_start:
            text = torch.cat([self.batch(i)[0] for i in range(CODEBOOK_BATCHES)])
            self.model.fit_codebooks(text, self.config.seed, "codebook", split=self.split)
            # Sums on a GPU may be rounded in another order each time.
            self.split.processes.take_from_first([vq.codebook for vq in self.model.codebooks()])

    @property
    def wall_time_s(self) -> float:
        """Seconds so far, over every part of a resumed run."""
        return self.earlier_s + time.perf_counter() - self.started

    @property
    def evaluation_due(self) -> bool:
        """Whether the validation split is to be measured before the next step."""
        at_interval = self.step % self.config.eval_interval == 0 or self.step == self.config.steps
        return at_interval and self.step not in self.curves["val_step"]

    @property
    def diagnosis_due(self) -> bool:
        """Whether the rule is to be compared with the exact gradient before the next step."""
        every = self.diagnose_every
        at_interval = every > 0 and (self.step % every == 0 or self.step == self.config.steps)
        return at_interval and self.step not in self.diagnostics.get("step", ())

    def diagnose(self) -> None:
        """Compare the rule with the exact gradient on the batch of the next step.

        Where that fails after the first step, it warns: the run is worth more than what is said about it.
        """
        text = windows(self.val, self.model.config.block_size, self.corpus.sequences)[0][:DIAGNOSED_WINDOWS]
        measured = copy.deepcopy(self.diagnostics)
        try:
            measure_into(measured, self.model, *self.batch(self.step), text, self.step)
        except Exception as error:
            if self.step == 0:
                raise
            problem = f"{type(error).__name__}: {error}"
            warnings.warn(f"no diagnostics at step {self.step}: {problem}", stacklevel=2)
        else:
            self.diagnostics = measured

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of ``step``, (B, T) each, on the device."""
        return self.batches(step)

    def advance(self) -> float | None:
        """Take one step; return the mean training loss where a point of the curve is due."""
        start = time.perf_counter()
        batch = self.batch(self.step)
        loss = training_step(self.stepped, self.optimizer, self.config, *batch, self.step, self.split)
        self.step += 1
        if self.step == self.config.vq_start:
            self._quantise_when_due()
        self.pending.append(loss)
        point = None
        if self.step % curve_interval(self.config.steps) == 0 or self.step == self.config.steps:
            # The only place where the loop waits for the device.
            losses = torch.stack(self.pending).double().cpu()
            self.losses += losses.tolist()
            self.pending.clear()
            point = add_point(self.curves, self.step, losses, self.config, self.model.config.block_size)
        self.train_time_s += time.perf_counter() - start
        return point

    def evaluate(self) -> float:
        """Measure the validation loss, add it to the curve and return it; of answers, the accuracy too."""
        sequences, processes = self.corpus.sequences, self.split.processes
        where = (self.model, self.val, self.config, self.stepped, self.step)
        loss, accuracy = evaluation(*where, sequences, processes)
        if math.isfinite(loss):
            processes.require_same([*self.model.parameters(), *self.model.buffers()])
        if sequences:
            self.curves["val_accuracy"].append(accuracy)
        self.curves["val_step"].append(self.step)
        self.curves["val_loss"].append(loss)
        return loss

    def save(self, path: Path) -> None:
        """Write a checkpoint from which another `RunState` goes on bit for bit."""
        progress = {
            "step": self.step,
            "curves": self.curves,
            "losses": self.losses,
            "pending": [loss.item() for loss in self.pending],
            "diagnostics": self.diagnostics,
            "train_time_s": self.train_time_s,
            "wall_time_s": self.wall_time_s,
        }
        save_checkpoint(path, self.model, self.optimizer, self.config, self.corpus, progress)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint."""
        checkpoint.require_same_run(self.model.config, self.config, self.corpus)
        checkpoint.restore_model(self.model)
        checkpoint.restore_optimizer(self.model, self.optimizer)
        progress = checkpoint.progress
        dtype = next(self.model.parameters()).dtype
        self.step, self.curves, self.losses = progress["step"], progress["curves"], progress["losses"]
        self.model.quantise(self.step >= self.config.vq_start)
        self.pending = [torch.tensor(v, dtype=dtype, device=self.device) for v in progress["pending"]]
        self.diagnostics = progress["diagnostics"]
        self.train_time_s, self.earlier_s = progress["train_time_s"], progress["wall_time_s"]

    def result(self, status: str, interrupted: bool = False) -> TrainResult:
        """Return what the run has come to."""
        tokens = self.step * self.config.batch_size * self.model.config.block_size
        comparable = as_the_last(self.curves, self.config).values()
        return TrainResult(
            model=self.model,
            status=status,
            steps_done=self.step,
            curves=self.curves,
            best_val_loss=min(filter(math.isfinite, comparable), default=math.nan),
            wall_time_s=self.wall_time_s,
            tokens_per_s=tokens / self.train_time_s if self.train_time_s else math.nan,
            peak_memory_mib=peak_memory_mib(self.device),
            flops_per_token=self.flops_per_token,
            anchor_steps=anchors_in(self.step, self.config),
            diagnostics=self.diagnostics,
            interrupted=interrupted,
        )

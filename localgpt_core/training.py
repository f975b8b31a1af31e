r"""One training loop for every rule.

A step s of a run with seed r is a pure function of (state, r, s): its batch, its dropout masks and its probes
are drawn from keys that contain r and s (`localgpt_core.seeds`). A run that was stopped and resumed therefore
gives the same curve, to the last bit, as one that was not.

    lr(s) = lr (s + 1) / (warmup + 1)                                                  for s < warmup
            lr (m + (1 - m) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2)         after it,
            with m = min_lr_ratio

Optimiser: AdamW (Loshchilov and Hutter 2019), weight decay on matrices only, global gradient clipping; the
sizes and constants of the presets are nanoGPT's.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from localgpt_core.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.corpus import Corpus, batch, windows
from localgpt_core.cost import peak_memory_mib, step_flops
from localgpt_core.model import LocalGPT
from localgpt_core.seeds import seed_from
from localgpt_core.validation import require

__all__ = ["TrainResult", "build_model", "evaluate", "learning_rate", "select_device", "train"]

CURVE_POINTS = 100
EVAL_TOKENS = 16384
WARM_UP_STEPS, MEASURED_STEPS = 5, 20

Curves = dict[str, list[float]]
Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        model: The trained model, on its device.
        status: ``"finished"``; ``"diverged"``: a loss was not finite; ``"interrupted"``: stopped by Ctrl-C;
            ``"out_of_time"``: it could not have finished before the deadline.
        steps_done: Steps taken.
        curves: ``step``, ``tokens``, ``lr`` and ``train_loss`` (mean since the previous point), and
            ``val_step`` and ``val_loss`` on the whole validation split; nats per character.
        wall_time_s: Seconds in all, over every part of a resumed run.
        tokens_per_s: Training tokens per second, evaluation apart.
        peak_memory_mib: See `localgpt_core.cost.peak_memory_mib`.
        flops_per_token: Matmul FLOPs of one training step per token.
    """

    model: LocalGPT
    status: str
    steps_done: int
    curves: Curves
    wall_time_s: float
    tokens_per_s: float
    peak_memory_mib: float
    flops_per_token: float

    @property
    def final_val_loss(self) -> float:
        """Validation loss after the last step; NaN unless the run finished."""
        return self.curves["val_loss"][-1] if self.status == "finished" else math.nan

    @property
    def best_val_loss(self) -> float:
        """Lowest validation loss measured; NaN if none was finite."""
        return min((loss for loss in self.curves["val_loss"] if math.isfinite(loss)), default=math.nan)


def select_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: If it is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: allowed are 'cpu', 'cuda' or 'cuda:N'") from None
    require(device.type in ("cpu", "cuda"), "device", name, "allowed are 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        require((device.index or 0) < count, "device", name, f"this machine has {count} CUDA devices")
    return device


def build_model(
    model_config: LocalGPTConfig, train_config: TrainConfig, device: torch.device | str = "cpu"
) -> LocalGPT:
    """Return the untrained model of a run: a function of the two configurations only.

    Models of one seed start from the same weights whatever their rule. With ``freeze_body`` only the
    embeddings and the head are left to learn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(train_config.seed, "model"))
        model = LocalGPT(model_config)
    if train_config.precision == "float64":
        model.double()
    if train_config.freeze_body:
        model.blocks.requires_grad_(False)
        model.ln_f.requires_grad_(False)
    return model.to(device)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, with weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of ``step``, counted from 0: linear warm-up, then cosine decay."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def _precision(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


@torch.no_grad()
def evaluate(model: LocalGPT, ids: np.ndarray, train_config: TrainConfig) -> float:
    """Return the mean cross-entropy in nats per character over all of ``ids``, in fixed order.

    The text is cut into windows of ``block_size`` that do not overlap; every character but the first is
    predicted once, from what precedes it in its window. The model's mode is restored.
    """
    device = next(model.parameters()).device
    block_size = model.config.block_size
    x, y, x_rest, y_rest = windows(ids, block_size)
    rows = max(1, EVAL_TOKENS // block_size)
    pairs = [*zip(x.split(rows), y.split(rows), strict=True)]
    if x_rest.numel():
        pairs.append((x_rest, y_rest))
    was_training = model.training
    model.eval()
    total = 0.0
    with _precision(train_config, device):
        for inputs, targets in pairs:
            total += model(inputs.to(device), targets.to(device))[1].item() * targets.numel()
    model.train(was_training)
    return total / (len(ids) - 1)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    idx: Tensor,
    targets: Tensor,
    step: int,
) -> Tensor:
    """Take step ``step`` and return its loss, detached, without waiting for the device.

    ``model`` may be the compiled form of a `LocalGPT`.
    """
    torch.manual_seed(seed_from(config.seed, "dropout", step))
    model.align_feedback(config.seed, "probes", step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    with _precision(config, idx.device):
        _, loss = model(idx, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if config.grad_clip:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, config.grad_clip)
    optimizer.step()
    return loss.detach()


class _Run:
    """The state of a run between two steps, and how it is advanced, measured and saved."""

    def __init__(
        self, model_config: LocalGPTConfig, config: TrainConfig, corpus: Corpus, device: torch.device
    ) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        self.model = build_model(model_config, config, device)
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0
        self.curves: Curves = {
            key: [] for key in ("step", "tokens", "lr", "train_loss", "val_step", "val_loss")
        }
        self.pending: list[Tensor] = []
        self.train_time_s = 0.0
        self.earlier_s = 0.0
        self.started = time.perf_counter()
        self.interval = max(1, config.steps // CURVE_POINTS)
        self.stepped = torch.compile(self.model) if config.compile else self.model
        self.flops_per_token = step_flops(self.model, *self.batch(0)) / (
            config.batch_size * model_config.block_size
        )

    @property
    def wall_time_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self.started

    @property
    def evaluation_due(self) -> bool:
        at_interval = self.step % self.config.eval_interval == 0 or self.step == self.config.steps
        return at_interval and self.step not in self.curves["val_step"]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = batch(
            self.corpus.train,
            batch_size=self.config.batch_size,
            block_size=self.model.config.block_size,
            seed=self.config.seed,
            step=step,
        )
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def advance(self) -> float | None:
        """Take one step; return the mean training loss where a point of the curve is due."""
        start = time.perf_counter()
        loss = training_step(self.stepped, self.optimizer, self.config, *self.batch(self.step), self.step)
        self.step += 1
        self.pending.append(loss)
        point = None
        if self.step % self.interval == 0 or self.step == self.config.steps:
            # The only place where the loop waits for the device.
            losses = torch.stack(self.pending).double()
            point = losses.mean().item()
            self.pending.clear()
            self.curves["step"].append(self.step)
            self.curves["tokens"].append(self.step * self.config.batch_size * self.model.config.block_size)
            self.curves["lr"].append(learning_rate(self.step - 1, self.config))
            self.curves["train_loss"].append(point)
        self.train_time_s += time.perf_counter() - start
        return point

    def evaluate(self) -> float:
        loss = evaluate(self.model, self.corpus.val, self.config)
        self.curves["val_step"].append(self.step)
        self.curves["val_loss"].append(loss)
        return loss

    def save(self, path: Path) -> None:
        progress = {
            "step": self.step,
            "curves": self.curves,
            "pending": [loss.item() for loss in self.pending],
            "train_time_s": self.train_time_s,
            "wall_time_s": self.wall_time_s,
        }
        save_checkpoint(path, self.model, self.optimizer, self.config, self.corpus, progress)

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.require_same_run(self.model.config, self.config, self.corpus)
        checkpoint.restore_model(self.model)
        checkpoint.restore_optimizer(self.model, self.optimizer)
        progress = checkpoint.progress
        dtype = next(self.model.parameters()).dtype
        self.step, self.curves = progress["step"], progress["curves"]
        self.pending = [torch.tensor(v, dtype=dtype, device=self.device) for v in progress["pending"]]
        self.train_time_s, self.earlier_s = progress["train_time_s"], progress["wall_time_s"]

    def result(self, status: str) -> TrainResult:
        tokens = self.step * self.config.batch_size * self.model.config.block_size
        return TrainResult(
            model=self.model,
            status=status,
            steps_done=self.step,
            curves=self.curves,
            wall_time_s=self.wall_time_s,
            tokens_per_s=tokens / self.train_time_s if self.train_time_s else math.nan,
            peak_memory_mib=peak_memory_mib(self.device),
            flops_per_token=self.flops_per_token,
        )


def train(
    model_config: LocalGPTConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    *,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    deadline: float = math.inf,
    report: Report | None = None,
) -> TrainResult:
    """Train a model and return it with its curves.

    Args:
        model_config: The model and its rule; ``vocab_size`` must be the corpus's.
        train_config: The run.
        corpus: Where the batches and the validation split come from.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        checkpoint: File to write at every evaluation, at the end and when interrupted; None writes none.
        resume: Go on from ``checkpoint`` if it exists.
        deadline: Value of ``time.monotonic()`` by which the run must be over. It is stopped as soon as its
            own speed shows that it cannot be.
        report: Called with ``step`` and whatever was measured there: ``train_loss``, ``val_loss``.

    Raises:
        ValueError: For a corpus that does not fit the model, a device that is not there, or a checkpoint that
            is damaged or of another run.
    """
    device = select_device(str(device))
    allowed = f"must be the {corpus.vocab_size} of corpus {corpus.name!r}"
    require(model_config.vocab_size == corpus.vocab_size, "vocab_size", model_config.vocab_size, allowed)
    windows(corpus.val, model_config.block_size)
    report = report or (lambda measured: None)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        run = _Run(model_config, train_config, corpus, device)
        if resume and checkpoint is not None and Path(checkpoint).exists():
            run.restore(load_checkpoint(checkpoint))
        status = _advance_to_the_end(run, checkpoint, deadline, report)
        if checkpoint is not None and status in ("finished", "interrupted"):
            run.save(Path(checkpoint))
    return run.result(status)


@contextmanager
def _interrupt_between_steps() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is cut in half; the second one raises as usual.

    Outside the main thread, where Python allows no signal handlers, the event is never set.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    usual = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


def _advance_to_the_end(run: _Run, checkpoint: str | Path | None, deadline: float, report: Report) -> str:
    """Advance ``run`` until it is over and return the status."""
    first_step, measured_from = run.step, 0.0
    with _interrupt_between_steps() as interrupted:
        while True:
            if run.evaluation_due:
                loss = run.evaluate()
                report({"step": run.step, "val_loss": loss})
                if not math.isfinite(loss):
                    return "diverged"
                if checkpoint is not None and run.step > first_step:
                    run.save(Path(checkpoint))
            if run.step == run.config.steps:
                return "finished"
            if interrupted.is_set():
                return "interrupted"
            point = run.advance()
            if point is not None:
                report({"step": run.step, "train_loss": point})
                if not math.isfinite(point):
                    return "diverged"
            needed_s = 0.0
            if run.step == first_step + WARM_UP_STEPS:
                measured_from = time.monotonic()
            if run.step == first_step + WARM_UP_STEPS + MEASURED_STEPS:
                left = run.config.steps - run.step
                needed_s = left * (time.monotonic() - measured_from) / MEASURED_STEPS
            if time.monotonic() + needed_s > deadline:
                return "out_of_time"

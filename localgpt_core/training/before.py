"""What comes before the first step: text and compiler are held to the run, its FLOPs counted, and noise."""

from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from localgpt_core.common.modes import evaluation_mode
from localgpt_core.common.seeds import generator, seed_from
from localgpt_core.common.validation import require, require_integer
from localgpt_core.config import CODEBOOK_BATCHES, LocalGPTConfig, TrainConfig, check_run
from localgpt_core.config.schedule import anchors_in
from localgpt_core.corpus.batches import batch, windows
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.measure.cost import alignment_flops, codebook_fit_flops, forward_flops, step_flops
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.parallel.parts import WHOLE, Split
from localgpt_core.training.step import build_optimizer, precision, training_step

__all__ = ["check_compiled", "check_corpus", "planned_flops", "train_on_noise"]

# How far a compiled gradient may be off, relative to its size: it is rounded at other places. A derivative
# that is lost, or another one, is off by about its size. Half precision also chooses other winners or codes.
MOST_OFF = {"float64": 1e-6, "float32": 0.03, "bfloat16": 0.1}
MOST_OFF_BY_CHOICE = 0.7
SMALL = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-3}  # of the whole gradient: below it is rounding


def check_corpus(model: LocalGPTConfig, train: TrainConfig, corpus: Corpus) -> None:
    """Raise ``ValueError`` for what a run would fail by, be it in its last step.

    That is a seed that draws no batches, a vocabulary of another size, a context longer than the validation
    split or other than the sequences of the corpus, or more codes to fit than different vectors in the
    batches for it.
    """
    check_run(model, train)
    require_integer("seed", train.seed, 0, 2**64 - 1)
    allowed = f"must be the {corpus.vocab_size} of corpus {corpus.name!r}"
    require(model.vocab_size == corpus.vocab_size, "vocab_size", model.vocab_size, allowed)
    windows(corpus.val, model.block_size, corpus.sequences)
    if model.vq_init == "kmeans":
        # A batch that no memory holds is not the text's fault, and the run says so itself.
        with suppress(MemoryError):
            _check_codes(model, train, corpus)


def _check_codes(model: LocalGPTConfig, train: TrainConfig, corpus: Corpus) -> None:
    """Refuse more codes than distinct vectors: a token's is a function of the characters up to it."""
    streams = sum(map(model.has_bottleneck, range(model.n_layer))) if model.vq_shared else 1
    needed = -(-model.vq_codes // streams)
    sizes = {"batch_size": train.batch_size, "block_size": model.block_size, "seed": train.seed}
    drawn = [
        batch(corpus.train, **sizes, step=step, sequences=corpus.sequences)[0]
        for step in range(CODEBOOK_BATCHES)
    ]
    ids = np.concatenate([x.numpy() for x in drawn])
    context, found = np.zeros(len(ids), dtype=np.int64), 0
    for column in ids.T:
        # context[i] numbers the characters of row i so far, densely.
        distinct, context = np.unique(context * corpus.vocab_size + column, return_inverse=True)
        found += len(distinct)
        if found >= needed:
            return
    most = f"k-means has at most {found * streams} different vectors of corpus {corpus.name!r}"
    require(False, "vq_codes", model.vq_codes, f"{most} to fit them to")


def check_compiled(
    model: LocalGPT, stepped: nn.Module, config: TrainConfig, idx: Tensor, targets: Tensor
) -> None:
    """Raise ``ValueError`` unless ``stepped``, the compiled ``model``, gives its gradients on one batch.

    Without dropout, whose masks the compiler draws in its own way. The gradients of ``model`` are gone.
    """
    with evaluation_mode(model) if model.config.dropout else nullcontext():
        exact = _gradients(model, model, config, idx, targets)
        for _ in range(2 if idx.is_cuda else 0):  # tried, then recorded: only the third call is a replay
            _gradients(model, stepped, config, idx, targets)
        found = _gradients(model, stepped, config, idx, targets)
    most = MOST_OFF[config.precision]
    if config.precision == "bfloat16" and (model.config.mlp_topk or model.config.narrows_stream):
        most = MOST_OFF_BY_CHOICE
    size = sum(gradient.square().sum() for gradient in exact.values()).sqrt()
    for name, gradient in exact.items():
        off = (found[name] - gradient).norm() / (gradient.norm() + SMALL[config.precision] * size)
        allowed = f"gives {name} a gradient that is off by {off:.2g} of its size, and may be by {most}: "
        allowed += "run without it, or with another version of torch"
        require(bool(off <= most), "compile", True, allowed)


def planned_flops(
    model: LocalGPT, config: TrainConfig, idx: Tensor, targets: Tensor, split: Split = WHOLE
) -> int:
    """Return the matmul FLOPs of a whole run on batches like this one, evaluation apart."""
    total = config.noise_start * step_flops(model, idx, targets, split=split) if config.noise_start else 0
    if model.config.fa_grape_start:
        total += model.config.fa_grape_start * alignment_flops(model, idx, split)
    if model.config.vq_init == "kmeans":
        total += codebook_fit_flops(model, idx, CODEBOOK_BATCHES, split)
    start = min(config.vq_start, config.steps)
    for quantised, first, last in ((False, 0, start), (True, start, config.steps)):
        model.quantise(quantised)
        anchors = anchors_in(last, config) - anchors_in(first, config)
        others = last - first - anchors
        total += anchors * step_flops(model, idx, targets, True, split) if anchors else 0
        if others and config.anchor_only:
            total += others * forward_flops(model, idx, split)
        elif others:
            total += others * step_flops(model, idx, targets, split=split)
    model.quantise(True)
    return total


def train_on_noise(
    model: LocalGPT, stepped: nn.Module, config: TrainConfig, device: torch.device, split: Split = WHOLE
) -> None:
    """Train ``model``, whose compiled form ``stepped`` may be, on noise: a run of ``noise_start`` steps.

    Every input and every target is one of the characters, each as likely as the others and drawn by itself.
    The run is that of ``config`` but for its length: rule, size of a batch, warm-up and decay, with an
    optimiser of its own; none of its steps is an anchor.
    """
    seed = seed_from(config.seed, "noise")
    changes = {"seed": seed, "steps": config.noise_start, "anchor_interval": 0, "anchor_only": False}
    config = replace(config, **changes)
    optimizer = build_optimizer(model, config)
    size = (2, config.batch_size, model.config.block_size)
    for step in range(config.steps):
        drawn = torch.randint(model.config.vocab_size, size, generator=generator(seed, step))
        training_step(stepped, optimizer, config, *drawn.to(device), step, split)


def _gradients(
    model: LocalGPT, forward: nn.Module, config: TrainConfig, idx: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    with precision(config, idx.device):
        loss = forward(idx, targets)[1]
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    model.zero_grad(set_to_none=True)
    return gradients

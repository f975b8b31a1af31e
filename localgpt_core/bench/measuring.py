"""How long a training step takes, and what it costs, relative to backpropagation.

Variant and reference take turns within one process, in an order drawn anew for each pair, so that a machine
whose speed drifts slows both alike; what is reported is the median of the ratios pair by pair.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from localgpt_core.bench.peak import Peaks
from localgpt_core.bench.rows import Row
from localgpt_core.bench.variants import Change, Variant, arms_of, variants
from localgpt_core.common.environment import wait_for
from localgpt_core.common.validation import Refusal
from localgpt_core.config import LocalGPTConfig, TrainConfig, check_run, preset
from localgpt_core.experiments.suites import Suite
from localgpt_core.measure.cost import alignment_in_forward_passes, peak_step_bytes, step_flops
from localgpt_core.training.step import build_model, build_optimizer, compiled, training_step

__all__ = ["measure"]

WARM_UP_STEPS = 3


class Stepper:
    """A model with its optimiser and one batch, ready to be stepped."""

    def __init__(
        self, model_config: LocalGPTConfig, config: TrainConfig, device: torch.device, change: Change | None
    ) -> None:
        model = build_model(model_config, config)
        self.model = (change(model) if change else model).to(device)
        # Where only anchors are taken, the step that is measured is one that is taken.
        self.config, self.device = replace(config, anchor_only=False), device
        self.optimizer = build_optimizer(self.model, config)
        shape = (config.batch_size, model_config.block_size)
        source = torch.Generator("cpu").manual_seed(0)
        self.idx = torch.randint(model_config.vocab_size, shape, generator=source, device="cpu").to(device)
        self.forward = compiled(self.model) if config.compile else self.model
        for _ in range(WARM_UP_STEPS):
            self.step()

    def step(self) -> None:
        training_step(self.forward, self.optimizer, self.config, self.idx, self.idx, 0)

    def seconds(self) -> float:
        wait_for(self.device)
        start = time.perf_counter()
        self.step()
        wait_for(self.device)
        return time.perf_counter() - start

    def bytes(self) -> int:
        def eager_step() -> None:
            training_step(self.model, self.optimizer, self.config, self.idx, self.idx, 0)

        return peak_step_bytes(eager_step)

    def flops(self) -> int:
        return step_flops(self.model, self.idx, self.idx)

    def update(self) -> float:
        return alignment_in_forward_passes(self.model, self.idx)


def checked(measured: list[Variant], preset_name: str) -> list[Variant]:
    """Return ``measured`` if every variant can run.

    Raises:
        ValueError: Naming the first one that cannot.
    """
    for variant in measured:
        try:
            check_run(*preset(preset_name, variant.model, variant.train))
        except ValueError as error:
            raise Refusal(f"arm {variant.name!r}: {error}") from None
    return measured


def measure(
    preset_name: str,
    device: torch.device,
    pairs: int,
    say: Callable[[str], None],
    suite: Suite | None = None,
    peaks: Peaks | None = None,
) -> list[Row]:
    """Return the ratios of every variant, or of a suite's arms, at a preset's sizes.

    ``peaks`` keeps what was measured of the device. The random state of torch is kept.

    Raises:
        ValueError: For an arm that cannot run, before anything is measured.
    """
    rows, peaks = [], peaks or Peaks(device)
    measured = variants(preset(preset_name)[0].n_embd) if suite is None else arms_of(suite)
    checked(measured, preset_name)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for variant in measured:
            say(f"measuring {variant.name}")
            rows.append(_row(variant, preset_name, device, pairs, peaks))
    return rows


def _row(variant: Variant, preset_name: str, device: torch.device, pairs: int, peaks: Peaks) -> Row:
    model, config = preset(preset_name, variant.model, variant.train)
    reference_model, reference_config = preset(preset_name, variant.against, variant.train_against)
    torch.compiler.reset()
    ours = Stepper(model, config, device, variant.change)
    reference = Stepper(reference_model, reference_config, device, variant.change_reference)
    order = random.Random(0)
    ratios, times = [], []
    for _ in range(pairs):
        if order.random() < 0.5:
            mine = ours.seconds()
            theirs = reference.seconds()
        else:
            theirs = reference.seconds()
            mine = ours.seconds()
        ratios.append(mine / theirs)
        times.append(1000 * mine)
    low, median, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if pairs > 1 else [ratios[0]] * 3
    )
    memory, flops = ours.bytes() / reference.bytes(), ours.flops()
    own = statistics.median(times)
    return Row(
        variant.name,
        *(own, median, low, high, memory, flops / reference.flops(), ours.update()),
        tokens_per_second=1000 * ours.idx.numel() / own,
        step_gflop=flops / 1e9,
        peak_share=peaks.share(flops, own / 1000, config.precision),
    )

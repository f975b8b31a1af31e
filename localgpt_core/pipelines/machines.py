"""What is assumed of the machines of a pipeline, of their links, and of the order in which they work."""

import math
from dataclasses import dataclass

from localgpt_core.common.validation import require, require_choice, require_integer

__all__ = ["Pipeline"]

SCHEDULES = ("gpipe", "1f1b")
BROADCASTS = ("relay", "multicast")
MOST_STAGES, MOST_MICRO_BATCHES = 10_000, 100_000


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Equal machines in a row, one stage of the model on each, full-duplex links between neighbours.

    A link carries one message after the other, each way by itself: a message of x bits takes x / bandwidth
    of the link's time and is there ``latency_s`` later.

    Attributes:
        stages: Number of machines, S.
        micro_batches: Micro-batches of a step, M.
        micro_batch_size: Sequences of a micro-batch.
        schedule: ``"gpipe"``: every stage does all forward passes, then all backward passes (Huang et al.
            2019). ``"1f1b"``: stage s, counted from 0, does min(M, S - s) forward passes, then one backward
            and one forward pass in turn, and waits for the last one at the step's end (Narayanan et al. 2021,
            PipeDream-Flush; the order is that of PipeDream, Narayanan et al. 2019).
        flops_per_s: Peak rate of a machine, in FLOP/s.
        utilisation: Share of it that a stage reaches.
        bandwidth_bits_per_s: Rate of a link, each way, in bit/s.
        latency_s: Latency of a link, in seconds.
        broadcast: How direct feedback reaches all stages. ``"relay"``: each stage hands on what it got, over
            the links that else carry the chain of errors. ``"multicast"``: one more link of the same kind
            reaches them all at once.
        backward_cost: Matmul FLOPs of a backward pass in those of its forward pass; 2 for weight and input
            gradients.
        probes: Tangents that travel with a token whose Jacobian is estimated; for rules that follow the
            network's Jacobian only.
        tangent_cost: FLOPs of the forward pass of one tangent in those of the forward pass.
        kept_numbers: Numbers that a block keeps for its backward pass, per token and unit of width. 17 are
            the 34 bytes of Korthikanti et al. (2023), at 16 bits and without attention scores.
        bits: Bits of a number, in memory and on a link.

    Raises:
        ValueError: Naming the field, the value and what is allowed.
    """

    stages: int = 4
    micro_batches: int = 64
    micro_batch_size: int = 1
    schedule: str = "1f1b"
    flops_per_s: float = 312e12
    utilisation: float = 0.4
    bandwidth_bits_per_s: float = 10e9
    latency_s: float = 1e-4
    broadcast: str = "relay"
    backward_cost: float = 2.0
    probes: int = 1
    tangent_cost: float = 1.0
    kept_numbers: float = 17.0
    bits: int = 16

    def __post_init__(self) -> None:
        require_integer("stages", self.stages, 1, MOST_STAGES)
        require_integer("micro_batches", self.micro_batches, 1, MOST_MICRO_BATCHES)
        for name in ("micro_batch_size", "probes", "bits"):
            require_integer(name, getattr(self, name), 1)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("broadcast", self.broadcast, BROADCASTS)
        require(
            0 < self.flops_per_s < math.inf, "flops_per_s", self.flops_per_s, "must be positive and finite"
        )
        rate = self.bandwidth_bits_per_s  # inf: of links that take no time
        require(rate > 0, "bandwidth_bits_per_s", rate, "must be positive")
        for name in ("latency_s", "backward_cost", "tangent_cost", "kept_numbers"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "must be finite and not negative")
        require(0 < self.utilisation <= 1, "utilisation", self.utilisation, "must be in (0, 1]")

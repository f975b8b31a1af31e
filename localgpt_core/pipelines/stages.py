r"""What a stage of a pipeline computes, keeps and sends for a micro-batch, under the rule of a configuration.

Matmul FLOPs per token, with width C, context T, vocabulary V and tau tangents per token:

    forward pass of a block         24 C^2 + 4 T C            (Narayanan et al. 2021; attention not masked)
    of the head                     2 C V                     at the last stage
    backward pass                   backward_cost times its forward pass, exact inside each stage
    direct feedback                 2 V C                     e @ B, at every feedback point
    tangents                        tau tangent_cost times the forward pass, and 2 V C tau at every feedback
                                    point for the estimate (J p) p^T

A rule that follows the network's Jacobian sends a share ``jvp_share`` of the sequences with ``probes``
tangents each through the pipeline, tau on average, beside the forward pass. What they do to the logits comes
back beside the error, V numbers per tangent; the noise p each stage draws by itself. So its matrices are
those of the step before, where the package spends a pass of its own before the step.

Norms, embeddings, the optimiser and what narrows the stream take no time.
"""

from dataclasses import dataclass, replace

from localgpt_core.common.validation import require, require_integer
from localgpt_core.config import LocalGPTConfig
from localgpt_core.measure.pipeline import stage_message
from localgpt_core.pipelines.machines import Pipeline
from localgpt_core.rules import RULES

__all__ = ["Stage", "layers_per_stage", "measured_flops_per_s", "stages_of"]

POINTS = {"block": 1, "sublayer": 2}  # feedback points of a block


@dataclass(frozen=True)
class Stage:
    """One stage; FLOPs and bits per token.

    Attributes:
        forward_flops: Of its forward pass, tangents included.
        backward_flops: Of its backward pass, with what direct feedback takes.
        activation_bits: What is kept from the forward to the backward pass.
        feedback_bits: Its feedback matrices, in bits, whatever the tokens.
        forward_bits: What it sends to the next stage; 0 for the last one.
        error_bits: What it is sent back, by the next stage or by the last one; at the last stage, which makes
            the error, the error itself.
    """

    forward_flops: float
    backward_flops: float
    activation_bits: float
    feedback_bits: int
    forward_bits: float
    error_bits: float


def layers_per_stage(config: LocalGPTConfig, stages: int) -> list[int]:
    """Return how many of the blocks each stage has, at least one, so that the slowest one has least to do.

    The head counts as the part of a block that its forward pass is. Of equal blocks the first stages have
    those that are left over.

    Raises:
        ValueError: For more stages than blocks.
    """
    require_integer("stages", stages, 1, config.n_layer)
    if stages == 1:
        return [config.n_layer]
    head = _head_flops(config) / _block_flops(config)
    others = stages - 1

    def slowest(last: int) -> float:
        return max(-(-(config.n_layer - last) // others), last + head)

    last = min(range(1, config.n_layer - others + 1), key=lambda last: (slowest(last), -last))
    each, left = divmod(config.n_layer - last, others)
    return [each + (stage < left) for stage in range(others)] + [last]


def stages_of(config: LocalGPTConfig, pipeline: Pipeline) -> list[Stage]:
    """Return the stages of the model ``config`` in ``pipeline``.

    Raises:
        ValueError: For more stages than blocks, and for direct feedback at every layer, whose error goes both
            ways: through the stream and from the output.
    """
    direct, tangents = is_direct(config), tangents_per_token(config, pipeline)
    C, V, bits = config.n_embd, config.vocab_size, pipeline.bits
    points = POINTS[config.dfa_granularity] if direct else 0
    once = direct and config.dfa_source == "head" and C < V  # the last stage sends e @ B, of C numbers
    product = 2 * V * C
    found, block = [], -1
    for stage, layers in enumerate(numbers := layers_per_stage(config, pipeline.stages)):
        block += layers
        is_last = stage == len(numbers) - 1
        message = stage_message(config, block, bits)
        forward = layers * _block_flops(config) + is_last * _head_flops(config)
        backward = pipeline.backward_cost * forward + layers * points * tangents * product
        backward += (is_last if once else layers * points) * product
        back = message.broadcast + tangents * bits * V if direct else message.backward
        found.append(
            Stage(
                forward_flops=forward * (1 + tangents * pipeline.tangent_cost),
                backward_flops=backward,
                activation_bits=layers * pipeline.kept_numbers * C * bits,
                feedback_bits=0 if config.dfa_source == "head" else layers * points * V * C * bits,
                forward_bits=0 if is_last else message.forward + tangents * message.tangent,
                error_bits=V * bits if is_last else back,
            )
        )
    return found


def is_direct(config: LocalGPTConfig) -> bool:
    """Return whether the output's error goes to all stages at once, instead of from stage to stage.

    Raises:
        ValueError: For direct feedback at every layer.
    """
    direct = RULES[config.method].error == "output"
    allowed = (
        "must be " + " or ".join(map(repr, POINTS)) + " in a pipeline: between layers, errors go both ways"
    )
    require(
        not direct or config.dfa_granularity in POINTS, "dfa_granularity", config.dfa_granularity, allowed
    )
    return direct


def tangents_per_token(config: LocalGPTConfig, pipeline: Pipeline) -> float:
    """Return tau, the tangents that travel with a token on average."""
    follows = RULES[config.method](config.rule).aligns == "network"
    return pipeline.probes * config.jvp_share if follows else 0.0


def measured_flops_per_s(
    config: LocalGPTConfig, milliseconds: float, batch_size: int, pipeline: Pipeline | None = None
) -> float:
    """Return the rate of a machine on which the whole model takes a step in the time that was measured.

    With ``flops_per_s`` of that rate and ``utilisation`` 1, stages take the measured time divided among them
    by their FLOPs, and a single stage takes all of it. Rates of two rules differ: what is not a product of
    matrices counts as if it were.

    Args:
        config: The model and its rule.
        milliseconds: Median of a step, as in a row of `localgpt_core.bench.read_rows`.
        batch_size: Sequences of that step.
        pipeline: Its costs, of a backward pass and of a tangent; by default those of `Pipeline`.

    Raises:
        ValueError: Unless the time is positive and the batch has a sequence.
    """
    require(milliseconds > 0, "milliseconds", milliseconds, "must be positive")
    require_integer("batch_size", batch_size, 1)
    (whole,) = stages_of(config, replace(pipeline or Pipeline(), stages=1))
    flops = whole.forward_flops + whole.backward_flops
    return flops * batch_size * config.block_size * 1e3 / milliseconds


def _block_flops(config: LocalGPTConfig) -> int:
    return 24 * config.n_embd**2 + 4 * config.block_size * config.n_embd


def _head_flops(config: LocalGPTConfig) -> int:
    return 2 * config.n_embd * config.vocab_size

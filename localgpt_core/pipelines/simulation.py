r"""One step of a model in a pipeline, task by task.

Of micro-batch m at stage s of S, counted from 0, F is the forward pass, B the backward pass and X a message:

    F(s, m)   waits for   X on from s - 1
    B(s, m)   waits for   F(s, m), and X back to s
    X back    waits for   B(s + 1, m)    a chain of errors, as of backpropagation, from stage to stage
                          F(S - 1, m)    direct feedback: the output's error, relayed or sent to all

A stage does its passes in the order of the schedule, a link its messages in theirs. With equal stages, free
links and passes of f and b seconds a step takes

    chain     (M + S - 1) (f + b)    of which (S - 1) (f + b), a share (S - 1) / (M + S - 1), is bubble
    direct    (M + S - 1) f + M b    as no stage waits for the backward pass of another

under either schedule, the second for M >= S. Source of the first: Huang et al. 2019.
"""

from dataclasses import dataclass

from localgpt_core.config import LocalGPTConfig
from localgpt_core.pipelines.events import Task, most_at_once, play
from localgpt_core.pipelines.machines import Pipeline
from localgpt_core.pipelines.stages import Stage, is_direct, stages_of

__all__ = ["PipelineStep", "played", "simulate"]


@dataclass(frozen=True)
class PipelineStep:
    """What a step takes; the optimiser's part is not in it.

    Attributes:
        seconds: From the first forward pass to the end of the last backward pass.
        tokens_per_s: Tokens of the step over these seconds.
        bubble: Share of the stages' time in which they compute nothing: 1 - sum of busy_s / (S seconds).
        link_share: Share of the step in which the busiest link, of either direction, carries something.
        forward_bytes: What the busiest link carries forward.
        backward_bytes: What the busiest link carries back; by multicast, what its link carries.
        in_flight: Most micro-batches between start of forward and end of backward pass, by stage.
        activation_bytes: What is kept of these for the backward pass, at the stage that keeps most.
        error_bytes: Errors that have arrived, or been made, and not been used up, at the stage with most.
        feedback_bytes: Feedback matrices, at the stage with most.
    """

    seconds: float
    tokens_per_s: float
    bubble: float
    link_share: float
    forward_bytes: float
    backward_bytes: float
    in_flight: tuple[int, ...]
    activation_bytes: float
    error_bytes: float
    feedback_bytes: float


def simulate(config: LocalGPTConfig, pipeline: Pipeline) -> PipelineStep:
    """Return what a step of the model and rule ``config`` takes in ``pipeline``.

    Raises:
        ValueError: For more stages than blocks, and for direct feedback at every layer.
    """
    tokens = pipeline.micro_batch_size * config.block_size
    return played(stages_of(config, pipeline), pipeline, tokens, is_direct(config))


def played(stages: list[Stage], pipeline: Pipeline, tokens: int, direct: bool) -> PipelineStep:
    """Return what a step takes with these stages, micro-batches of ``tokens``, and direct feedback or not."""
    queues = _queues(stages, pipeline, tokens, direct)
    tasks = {task.name: task for queue in queues.values() for task in queue}
    times = play(queues)
    seconds = max(end for _, end in times.values())
    busy = {place: sum(task.seconds for task in queue) for place, queue in queues.items()}
    computing = sum(busy["stage", s] for s in range(len(stages)))
    linked = max((time for (kind, _), time in busy.items() if kind != "stage"), default=0.0)

    in_flight, waiting = [], []
    for s in range(len(stages)):
        kept, errors = [], []
        for m in range(pipeline.micro_batches):
            end, source = times["B", s, m][1], tasks["B", s, m].after[-1]
            kept.append((times["F", s, m][0], end))
            errors.append((times[source][1] + tasks[source].lag, end))
        in_flight.append(most_at_once(kept))
        waiting.append(most_at_once(errors))

    step_tokens = pipeline.micro_batches * tokens
    activations = (number * stage.activation_bits for number, stage in zip(in_flight, stages, strict=True))
    errors = (number * stage.error_bits for number, stage in zip(waiting, stages, strict=True))
    return PipelineStep(
        seconds=seconds,
        tokens_per_s=step_tokens / seconds,
        bubble=1 - computing / (len(stages) * seconds),
        link_share=linked / seconds,
        forward_bytes=step_tokens * max(stage.forward_bits for stage in stages) / 8,
        backward_bytes=step_tokens * max((stage.error_bits for stage in stages[:-1]), default=0) / 8,
        in_flight=tuple(in_flight),
        activation_bytes=tokens * max(activations) / 8,
        error_bytes=tokens * max(errors) / 8,
        feedback_bytes=max(stage.feedback_bits for stage in stages) / 8,
    )


def _queues(
    stages: list[Stage], pipeline: Pipeline, tokens: int, direct: bool
) -> dict[tuple[str, int], list[Task]]:
    """Return the tasks of every stage and link, each in its order; of a B, ``after`` ends with its error."""
    last, every = len(stages) - 1, range(pipeline.micro_batches)
    rate = pipeline.flops_per_s * pipeline.utilisation
    at_once = direct and pipeline.broadcast == "multicast"

    def message(name: tuple, bits: float, source: tuple) -> Task:
        seconds = tokens * bits / pipeline.bandwidth_bits_per_s
        return Task(name, seconds, (source,), pipeline.latency_s)

    def error(s: int, m: int) -> tuple:
        """Return the task that brings, or makes, the error for B(s, m)."""
        return ("F", last, m) if s == last else ("back", last - 1 if at_once else s, m)

    queues: dict[tuple[str, int], list[Task]] = {}
    for s, stage in enumerate(stages):
        forward_s, backward_s = (
            tokens * flops / rate for flops in (stage.forward_flops, stage.backward_flops)
        )
        queues["stage", s] = [
            Task(("F", s, m), forward_s, (("on", s - 1, m),) if s else ())
            if kind == "F"
            else Task(("B", s, m), backward_s, (("F", s, m), error(s, m)))
            for kind, m in _order(pipeline, s)
        ]
        if s < last:
            queues["on", s] = [message(("on", s, m), stage.forward_bits, ("F", s, m)) for m in every]
        if s == last - 1 or (s < last and not at_once):
            queues["back", s] = [
                message(("back", s, m), stage.error_bits, error(s + 1, m) if direct else ("B", s + 1, m))
                for m in every
            ]
    return queues


def _order(pipeline: Pipeline, s: int) -> list[tuple[str, int]]:
    """Return the passes of stage ``s``, each with its micro-batch, in the order of the schedule."""
    number = pipeline.micro_batches
    ahead = number if pipeline.schedule == "gpipe" else min(number, pipeline.stages - s)
    order = [("F", m) for m in range(ahead)]
    for m in range(number):
        order += [("B", m), *([("F", m + ahead)] if m + ahead < number else [])]
    return order

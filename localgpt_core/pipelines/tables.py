"""Two models that no machine here holds, in pipelines of several lengths; and a token on a slow link."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from localgpt_core.common.validation import require, require_choice
from localgpt_core.config import LocalGPTConfig
from localgpt_core.measure.pipeline import StageMessage
from localgpt_core.pipelines.machines import Pipeline
from localgpt_core.pipelines.simulation import simulate

__all__ = ["LINKS", "PAPER_RULES", "SIZES", "link_rows", "paper_config", "pipeline_rows"]

# As deep as the longest pipeline of the tables.
SIZES: dict[str, dict[str, Any]] = {
    "1 B": {"n_layer": 64, "n_head": 17, "n_embd": 1088, "block_size": 2048, "vocab_size": 32_000},
    "100 B": {"n_layer": 64, "n_head": 89, "n_embd": 11_392, "block_size": 2048, "vocab_size": 32_000},
}
DIRECT = {"method": "dfa", "dfa_granularity": "block"}
PAPER_RULES: dict[str, dict[str, Any]] = {
    "bp": {},
    "dfa, block": DIRECT,
    "dfa, head's matrix": {**DIRECT, "dfa_source": "head"},
    "grape, block": {**DIRECT, "fa_grape": True},
}
STAGES = (1, 4, 16, 64)
LINKS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10}


def paper_config(size: str, rule: str = "bp", **changes: Any) -> LocalGPTConfig:
    """Return the configuration of a model of ``SIZES`` under a rule of ``PAPER_RULES``.

    ``changes`` are fields of it, such as what narrows the stream. Nothing of that size is built.

    Raises:
        ValueError: For an unknown size or rule, and for what a configuration refuses.
    """
    require_choice("size", size, SIZES)
    require_choice("rule", rule, PAPER_RULES)
    return LocalGPTConfig(**{**SIZES[size], **PAPER_RULES[rule], **changes})


def parameters(config: LocalGPTConfig) -> int:
    """Return the parameters of the matrices of a model: 12 L C^2 + (2 V + T) C."""
    embeddings = 2 * config.vocab_size + config.block_size
    return (12 * config.n_layer * config.n_embd + embeddings) * config.n_embd


def pipeline_rows(
    pipeline: Pipeline | None = None,
    stages: Sequence[int] = STAGES,
    sizes: Sequence[str] = tuple(SIZES),
    rules: Sequence[str] = tuple(PAPER_RULES),
    **changes: Any,
) -> list[dict[str, Any]]:
    """Return a row for every size, number of stages and rule: these three, and what a step takes.

    A row has ``size``, ``parameters``, ``stages``, ``rule`` and the fields of `PipelineStep`, but for
    ``in_flight`` its largest number.

    Args:
        pipeline: What is assumed of machines, links and schedule; by default that of `Pipeline`.
        stages: Numbers of stages.
        sizes: Names in ``SIZES``.
        rules: Names in ``PAPER_RULES``.
        changes: Fields of every configuration, see `paper_config`.

    Raises:
        ValueError: For what `paper_config`, `Pipeline` and `simulate` refuse.
    """
    pipeline = pipeline or Pipeline()
    rows = []
    for size in sizes:
        configs = {rule: paper_config(size, rule, **changes) for rule in rules}
        for number in stages:
            for rule, config in configs.items():
                step = asdict(simulate(config, replace(pipeline, stages=number)))
                step["in_flight"] = max(step["in_flight"])
                about = {"size": size, "parameters": parameters(config), "stages": number, "rule": rule}
                rows.append(about | step)
    return rows


def link_rows(
    message: StageMessage, links: Mapping[str, float] = LINKS
) -> list[dict[str, float | str | None]]:
    """Return a row for every link: microseconds that a token occupies it for, by what is sent.

    A row has ``link``, ``forward_us``, ``backward_us`` and ``broadcast_us``, bits over the rate of the link,
    and ``tokens_per_s``, those that the busiest direction lets through: forward, or backward with the
    broadcast beside it. That is None where nothing is sent.

    Args:
        message: Bits per token, see `localgpt_core.measure.stage_message`.
        links: Rates by name, in bit/s.

    Raises:
        ValueError: For a rate that is not positive.
    """
    rows = []
    for name, rate in links.items():
        require(rate > 0, "links", rate, "must be positive, in bit/s")
        busiest = max(message.forward, message.backward + message.broadcast)
        times = {
            f"{way}_us": getattr(message, way) / rate * 1e6 for way in ("forward", "backward", "broadcast")
        }
        rows.append({"link": name, **times, "tokens_per_s": rate / busiest if busiest else None})
    return rows

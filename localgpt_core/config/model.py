"""The configuration of a model.

Every field is documented once, in its metadata: the command line shows the same words. A value or a
combination that cannot work raises ValueError; a field that would have no effect is refused as well.
"""

import sys
from dataclasses import dataclass, fields

from localgpt_core.common.validation import option, require, require_integer
from localgpt_core.config.allowed import (
    ATTENTION_MODES,
    BETWEEN_LAYERS,
    CODE_BACKWARDS,
    CODE_NORMS,
    CODEBOOKS,
    FEEDBACK_SOURCES,
    GELU_SURROGATES,
    GRANULARITIES,
    INSIDE_RULES,
    LAYER_NORMS,
    MOST_BITS,
    ONLY_BOTTLENECK,
    SIGMOID_BIASES,
    SUBSPACE_EMBEDDINGS,
    SUBSPACES,
    WITH_BOTTLENECK,
    WITH_CODES,
    WITH_FIXED_FEEDBACK,
    WITH_SIGMOID,
    WITH_SOFTMAX,
    WITH_TANGENTS,
)
from localgpt_core.rules import RULES, RuleOptions
from localgpt_core.rules.base import LARGEST_SIZE, START_OPTIONS

__all__ = ["MOST_BLOCKS", "LocalGPTConfig", "block_numbers"]

SYMBOLS = sys.maxunicode + 1
MOST_BLOCKS = 10_000


def block_numbers(field: str, text: str, blocks: int) -> list[int]:
    """Return the block numbers that ``text`` lists, such as ``"0,2"``; none for ``""``.

    Raises:
        ValueError: Naming ``field``, unless they ascend, are below ``blocks`` and are written in the one way
            that there is: another spelling would be another run with the same result.
    """
    allowed = f"must be ascending block numbers below {blocks}, such as '0'"
    parts = text.split(",") if text else []
    longest = len(str(MOST_BLOCKS))
    require(all(part.isdecimal() and len(part) <= longest for part in parts), field, text, allowed)
    numbers = sorted({int(part) for part in parts})
    canonical = text == ",".join(map(str, numbers)) and all(number < blocks for number in numbers)
    require(canonical, field, text, allowed)
    return numbers


@dataclass(frozen=True, kw_only=True)
class LocalGPTConfig(RuleOptions):
    """What a `LocalGPT` is: nanoGPT's sizes, the rule of `RuleOptions`, local derivatives, bottlenecks.

    Each field's meaning is in its metadata and in ``localgpt train --help``.

    Raises:
        ValueError: Naming the field, the value and what is allowed.
    """

    block_size: int = option(256, "longest context, in characters", minimum=1, maximum=LARGEST_SIZE)
    vocab_size: int = option(65, "number of symbols", minimum=1, maximum=SYMBOLS)
    n_layer: int = option(6, "number of blocks", minimum=1, maximum=MOST_BLOCKS)
    n_head: int = option(6, "attention heads per block", minimum=1, maximum=LARGEST_SIZE)
    n_embd: int = option(384, "width of the residual stream, in units", minimum=1, maximum=LARGEST_SIZE)
    dropout: float = option(0.2, "dropout probability", within="[0, 1)")
    bias: bool = option(False, "biases in the linear layers (norms always have one)")
    attn_mode: str = option("sigmoid", "attention: sigmoid or softmax", choices=ATTENTION_MODES)
    sigmoid_bias_mode: str = option(
        "neg_log_n",
        "bias of sigmoid attention: neg_log_n, zero or learned",
        choices=SIGMOID_BIASES,
        needs=WITH_SIGMOID,
    )
    ste_sigmoid: bool = option(False, "straight-through backward for sigmoid attention", needs=WITH_SIGMOID)
    ste_gelu: bool = option(False, "a surrogate derivative for GELU, straight-through by default")
    gelu_surrogate: str = option(
        "identity",
        "derivative in GELU's place with ste_gelu: " + ", ".join(GELU_SURROGATES),
        choices=GELU_SURROGATES,
        needs=("has no effect without ste_gelu=True", lambda config: config.ste_gelu),
    )
    freeze_emb: bool = option(False, "do not train token and position embeddings")
    ln_mode: str = option(
        "bp",
        "backward rule of LayerNorm: " + ", ".join(LAYER_NORMS[:-1]) + "; none: no normalisation",
        choices=LAYER_NORMS,
    )
    fuse_attn_local: bool = option(
        False, "softmax and value mixing in one op (no attention dropout)", needs=WITH_SOFTMAX
    )
    mlp_topk: int = option(
        0,
        "units that k-WTA keeps of the MLP's hidden activation; 0 = off",
        minimum=0,
        maximum=lambda config: 4 * config.n_embd,
    )
    resid_topk: int = option(
        0,
        "units that k-WTA keeps of the block's output; 0 = off",
        minimum=0,
        maximum=lambda config: config.n_embd,
    )
    vq_codes: int = option(
        0, "codes of a frozen codebook at each block's end; 0 = off", minimum=0, maximum=LARGEST_SIZE
    )
    vq_shared: bool = option(True, "one codebook for all blocks", needs=WITH_CODES)
    vq_init: str = option(
        "random",
        "frozen codes: random directions, or kmeans: a run fits them to its stream",
        choices=CODEBOOKS,
        needs=WITH_CODES,
    )
    vq_groups: int = option(
        1,
        "groups of units with a code each, out of vq_codes of their own",
        minimum=1,
        maximum=lambda config: config.n_embd,
        needs=WITH_CODES,
    )
    vq_rms: str = option(
        "token",
        "norm of a quantised group: token: its own; fixed: one for all, so that a token's RMS is 1",
        choices=CODE_NORMS,
        needs=WITH_CODES,
    )
    vq_backward: str = option(
        "identity",
        "gradient below a codebook: identity; tangent: without its part along the group; or rotation: turned "
        "as the group is turned to its code",
        choices=CODE_BACKWARDS,
        needs=(WITH_CODES, WITH_TANGENTS),
    )
    subspace_rank: int = option(
        0,
        "rank of a frozen subspace at each block's end; 0 = off",
        minimum=0,
        maximum=lambda config: config.n_embd,
    )
    subspace_mode: str = option(
        "project",
        "project the stream, or constrain what attention and MLP write and spare the embeddings",
        choices=SUBSPACES,
        needs=("has no effect without subspace_rank", lambda config: config.subspace_rank > 0),
    )
    subspace_embeddings: str = option(
        "free",
        "what embeddings learn: free, anything; constrain, a vector of the subspace each, beside their start",
        choices=SUBSPACE_EMBEDDINGS,
        needs=(
            ("needs subspace_mode='constrain'", lambda config: config.subspace_mode == "constrain"),
            ("has no effect with freeze_emb=True", lambda config: not config.freeze_emb),
        ),
    )
    resid_bits: int = option(
        0,
        "bits that every number of the block's output is rounded to, on a scale of its token; 0 = off",
        minimum=0,
        maximum=MOST_BITS,
        needs=ONLY_BOTTLENECK,
    )
    bottleneck_at: str = option(
        "",
        "blocks with a bottleneck at their end, such as 0,2; empty = all",
        needs=WITH_BOTTLENECK,
    )
    gated_blocks: bool = option(False, "a learned scalar gate per block and sublayer")
    gate_start: float = option(
        1.0,
        "where the gates start; 0 is ReZero's",
        within="(-inf, inf)",
        needs=("has no effect without gated_blocks=True", lambda config: config.gated_blocks),
    )
    dfa_granularity: str = option(
        "layer",
        "where the output's error comes in: at every " + ", ".join(GRANULARITIES),
        choices=GRANULARITIES,
    )
    dfa_norm: bool = option(
        False,
        "between (sub)layers, let it in through the derivative of a LayerNorm",
        needs=BETWEEN_LAYERS,
    )
    dfa_inside: str = option(
        "bp",
        "rule of the layers between these points: bp; grape: fa aligned by probes; kp: Kolen-Pollack "
        "aligned by Kaczmarz steps; their feedback starts as the points' does",
        choices=INSIDE_RULES,
        needs=BETWEEN_LAYERS,
    )

    dfa_source: str = option(
        "random",
        "feedback between (sub)layers: random; or head, a control: the head's weight times the last norm's "
        "gain, read in every step (weight transport), and for the head itself its weight",
        choices=FEEDBACK_SOURCES,
        needs=(
            BETWEEN_LAYERS,
            WITH_FIXED_FEEDBACK,
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"must be divisible by n_head={self.n_head}"
        require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, allowed)
        allowed = f"must divide n_embd={self.n_embd}"
        require(self.n_embd % self.vq_groups == 0, "vq_groups", self.vq_groups, allowed)
        rule = RULES[self.method]
        if rule.error != "output":
            users = " or ".join(name for name, rule in RULES.items() if rule.error == "output")
            allowed = f"has no effect with method={self.method!r}; needs method {users}"
        else:
            # Between layers there is no weight.
            allowed = f"must be 'layer' with method={self.method!r}, which needs the weight of a layer"
        direct = rule.error == "output" and rule.transports == "nothing" and rule(self).aligns != "layer"
        require(direct or self.dfa_granularity == "layer", "dfa_granularity", self.dfa_granularity, allowed)
        self._check_blocks()
        if self.dfa_source == "head" and self.dfa_inside == "bp":
            for name in sorted(START_OPTIONS):
                value, allowed = getattr(self, name), "has no effect with dfa_source='head': nothing is drawn"
                require(value == getattr(RuleOptions, name), name, value, allowed)
        # The narrowest layer input is n_embd wide.
        require_integer("fa_sparse_k", self.fa_sparse_k, 0, self.n_embd)

    def _check_blocks(self) -> None:
        numbers = block_numbers("bottleneck_at", self.bottleneck_at, self.n_layer)
        every = len(numbers) == self.n_layer
        require(not every, "bottleneck_at", self.bottleneck_at, "are all blocks, which is written as ''")
        if self.subspace_mode == "constrain":
            allowed = "must be the first blocks with subspace_mode='constrain': what one writes outside stays"
            require(numbers == [*range(len(numbers))], "bottleneck_at", self.bottleneck_at, allowed)

    @property
    def rule(self) -> RuleOptions:
        """The rule of ``method`` with its own options and nothing else."""
        return RuleOptions(**{item.name: getattr(self, item.name) for item in fields(RuleOptions)})

    @property
    def head_rule(self) -> RuleOptions:
        """The rule of the head: `rule`, or backpropagation where its weight is read anyway."""
        return RuleOptions() if self.dfa_source == "head" else self.rule

    @property
    def inside_rule(self) -> RuleOptions:
        """The rule of the linear layers inside the blocks.

        That is `rule`, unless direct feedback comes in between (sub)layers only: then it is what
        ``dfa_inside`` names, whose feedback starts as that of the points does.
        """
        if self.dfa_granularity == "layer":
            return self.rule
        options = INSIDE_RULES[self.dfa_inside]
        method = options.get("method", RuleOptions.method)
        starts = {name: getattr(self, name) for name in START_OPTIONS & RULES[method].uses}
        return RuleOptions(**options, **starts)

    @property
    def narrows_stream(self) -> bool:
        """Whether the residual stream has a bottleneck at the end of some block."""
        sizes = (self.resid_topk, self.vq_codes, self.subspace_rank, self.resid_bits)
        return any(size > 0 for size in sizes)

    def has_bottleneck(self, block: int) -> bool:
        """Return whether what narrows the stream stands at the end of ``block``, counted from 0."""
        return not self.bottleneck_at or str(block) in self.bottleneck_at.split(",")

    @property
    def is_exact(self) -> bool:
        """Whether every backward pass is the true derivative: backpropagation without surrogates."""
        skips = self.ste_sigmoid or self.ste_gelu or self.vq_codes > 0 or self.resid_bits > 0
        return RULES[self.method].is_derivative and not skips and self.ln_mode in ("bp", "projected", "none")

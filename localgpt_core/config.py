"""The configuration of a model and of a training run, and the three presets.

Every field is documented once, in its metadata: the command line shows the same words. A value or a
combination that cannot work raises ValueError; a field that would have no effect is refused as well.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from localgpt_core.rules import RULES, RuleOptions
from localgpt_core.rules.base import option
from localgpt_core.validation import require, require_choice, require_integer, require_types

__all__ = ["PRESETS", "LocalGPTConfig", "TrainConfig", "preset"]

ATTENTION_MODES = ("sigmoid", "softmax")
SIGMOID_BIASES = ("neg_log_n", "zero", "learned")
GRANULARITIES = ("layer", "sublayer", "block")
INSIDE_RULES = ("bp", "grape", "kp")
LAYER_NORMS = ("bp", "ste", "center_scale", "projected", "scale", "none")
GELU_SURROGATES = ("identity", "relu", "steps")
CODEBOOKS = ("random", "kmeans")
SUBSPACES = ("project", "constrain")
PRECISIONS = ("float64", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LocalGPTConfig(RuleOptions):
    """What a `LocalGPT` is: nanoGPT's sizes, the rule of `RuleOptions`, local derivatives, bottlenecks.

    Each field's meaning is in its metadata and in ``localgpt train --help``.

    Raises:
        ValueError: Naming the field, the value and what is allowed.
    """

    block_size: int = option(256, "longest context, in characters")
    vocab_size: int = option(65, "number of symbols")
    n_layer: int = option(6, "number of blocks")
    n_head: int = option(6, "attention heads per block")
    n_embd: int = option(384, "width of the residual stream")
    dropout: float = option(0.2, "dropout probability")
    bias: bool = option(False, "biases in the linear layers (norms always have one)")
    attn_mode: str = option("sigmoid", "attention: sigmoid or softmax")
    sigmoid_bias_mode: str = option("neg_log_n", "bias of sigmoid attention: neg_log_n, zero or learned")
    ste_sigmoid: bool = option(False, "straight-through backward for sigmoid attention")
    ste_gelu: bool = option(False, "a surrogate derivative for GELU, straight-through by default")
    gelu_surrogate: str = option(
        "identity", "derivative in GELU's place with ste_gelu: " + ", ".join(GELU_SURROGATES)
    )
    freeze_emb: bool = option(False, "do not train token and position embeddings")
    ln_mode: str = option(
        "bp", "backward rule of LayerNorm: " + ", ".join(LAYER_NORMS[:-1]) + "; none: no normalisation"
    )
    fuse_attn_local: bool = option(False, "softmax and value mixing in one op (no attention dropout)")
    mlp_topk: int = option(0, "k-WTA on the MLP's hidden activation; 0 = off")
    resid_topk: int = option(0, "k-WTA on the block's output; 0 = off")
    vq_codes: int = option(0, "codes of a frozen codebook at each block's end; 0 = off")
    vq_shared: bool = option(True, "one codebook for all blocks")
    vq_init: str = option(
        "random", "frozen codes: random directions, or kmeans: a run fits them to its stream"
    )
    subspace_rank: int = option(0, "rank of a frozen subspace at each block's end; 0 = off")
    subspace_mode: str = option(
        "project", "project the stream, or constrain what attention and MLP write and spare the embeddings"
    )
    bottleneck_at: str = option("", "blocks with a bottleneck at their end, such as 0,2; empty = all")
    gated_blocks: bool = option(False, "a learned scalar gate per block and sublayer")
    gate_start: float = option(1.0, "where the gates start; 0 is ReZero's")
    dfa_granularity: str = option(
        "layer", "where the output's error comes in: at every " + ", ".join(GRANULARITIES)
    )
    dfa_norm: bool = option(False, "between (sub)layers, let it in through the derivative of a LayerNorm")
    dfa_inside: str = option("bp", "rule of the layers between these points: " + ", ".join(INSIDE_RULES))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            require_integer(name, getattr(self, name), 1)
        require(
            self.n_embd % self.n_head == 0,
            "n_embd",
            self.n_embd,
            f"must be divisible by n_head={self.n_head}",
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        require_choice("attn_mode", self.attn_mode, ATTENTION_MODES)
        require_choice("sigmoid_bias_mode", self.sigmoid_bias_mode, SIGMOID_BIASES)
        require_choice("ln_mode", self.ln_mode, LAYER_NORMS)
        if self.attn_mode == "softmax":
            default = LocalGPTConfig.sigmoid_bias_mode
            allowed = "has no effect with attn_mode='softmax'; needs attn_mode='sigmoid'"
            require(self.sigmoid_bias_mode == default, "sigmoid_bias_mode", self.sigmoid_bias_mode, allowed)
            require(not self.ste_sigmoid, "ste_sigmoid", self.ste_sigmoid, allowed)
        else:
            allowed = "needs attn_mode='softmax'"
            require(not self.fuse_attn_local, "fuse_attn_local", self.fuse_attn_local, allowed)
        require_choice("dfa_granularity", self.dfa_granularity, GRANULARITIES)
        if RULES[self.method].error != "output":
            users = " or ".join(name for name, rule in RULES.items() if rule.error == "output")
            allowed = f"has no effect with method={self.method!r}; needs method {users}"
            require(self.dfa_granularity == "layer", "dfa_granularity", self.dfa_granularity, allowed)
        require_choice("dfa_inside", self.dfa_inside, INSIDE_RULES)
        if self.dfa_granularity == "layer":
            allowed = "needs dfa_granularity='sublayer' or 'block'"
            require(not self.dfa_norm, "dfa_norm", self.dfa_norm, allowed)
            require(self.dfa_inside == "bp", "dfa_inside", self.dfa_inside, allowed)
        require_integer("mlp_topk", self.mlp_topk, 0, 4 * self.n_embd)
        require_integer("resid_topk", self.resid_topk, 0, self.n_embd)
        require_integer("vq_codes", self.vq_codes, 0)
        require_integer("subspace_rank", self.subspace_rank, 0, self.n_embd)
        require_choice("gelu_surrogate", self.gelu_surrogate, GELU_SURROGATES)
        require_choice("vq_init", self.vq_init, CODEBOOKS)
        require_choice("subspace_mode", self.subspace_mode, SUBSPACES)
        require(math.isfinite(self.gate_start), "gate_start", self.gate_start, "must be finite")
        for name, needed, switch in (
            ("gelu_surrogate", "ste_gelu=True", self.ste_gelu),
            ("vq_shared", "vq_codes", self.vq_codes),
            ("vq_init", "vq_codes", self.vq_codes),
            ("subspace_mode", "subspace_rank", self.subspace_rank),
            ("gate_start", "gated_blocks=True", self.gated_blocks),
            ("bottleneck_at", "resid_topk, vq_codes or subspace_rank", self.narrows_stream),
        ):
            value, default = getattr(self, name), getattr(LocalGPTConfig, name)
            require(bool(switch) or value == default, name, value, f"has no effect without {needed}")
        self._require_blocks()
        if self.fa_init_mode == "sparse":
            # The narrowest layer input is n_embd wide.
            require_integer("fa_sparse_k", self.fa_sparse_k, 0, self.n_embd)

    def _require_blocks(self) -> None:
        at, allowed = self.bottleneck_at, f"must be ascending block numbers below {self.n_layer}, such as '0'"
        parts = at.split(",") if at else []
        require(all(part.isdecimal() for part in parts), "bottleneck_at", at, allowed)
        numbers = sorted({int(part) for part in parts})
        # One way to write each choice: another spelling would be another run with the same result.
        canonical = at == ",".join(map(str, numbers)) and all(number < self.n_layer for number in numbers)
        require(canonical, "bottleneck_at", at, allowed)
        allowed = "has no effect with subspace_mode='constrain', which needs every block"
        require(not at or self.subspace_mode == "project", "bottleneck_at", at, allowed)

    @property
    def narrows_stream(self) -> bool:
        """Whether the residual stream has a bottleneck at the end of some block."""
        return self.resid_topk > 0 or self.vq_codes > 0 or self.subspace_rank > 0

    def has_bottleneck(self, block: int) -> bool:
        """Return whether what narrows the stream stands at the end of ``block``, counted from 0."""
        return not self.bottleneck_at or str(block) in self.bottleneck_at.split(",")

    @property
    def is_exact(self) -> bool:
        """Whether every backward pass is the true derivative: backpropagation without surrogates."""
        skips = self.ste_sigmoid or self.ste_gelu or self.vq_codes > 0
        return self.method == "bp" and not skips and self.ln_mode in ("bp", "projected", "none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained: AdamW, linear warm-up, cosine decay, clipping, fixed validation.

    Each field's meaning is in its metadata and in ``localgpt train --help``. Everything here can change the
    result; where and how fast a run goes (device, threads) is not here.

    Raises:
        ValueError: Naming the field, the value and what is allowed.
    """

    seed: int = option(1, "seed of weights, feedback, batches, dropout and probes")
    steps: int = option(5000, "training steps")
    batch_size: int = option(64, "sequences per step")
    lr: float = option(1e-3, "peak learning rate")
    min_lr_ratio: float = option(0.1, "final learning rate over the peak")
    warmup: int = option(100, "steps of linear warm-up")
    beta1: float = option(0.9, "AdamW's first moment decay")
    beta2: float = option(0.99, "AdamW's second moment decay")
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only")
    grad_clip: float = option(1.0, "largest global gradient norm; 0 = no clipping")
    eval_interval: int = option(250, "steps between evaluations on the whole validation split")
    freeze_body: bool = option(False, "control: train embeddings and head only")
    anchor_interval: int = option(0, "every how many steps one is backpropagation (an anchor); 0 = never")
    vq_start: int = option(0, "steps before the codebook is in use (and, with kmeans, fitted)")
    precision: str = option("float32", "float32, bfloat16 (autocast) or float64 (parameters)")
    compile: bool = option(False, "torch.compile the model")

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("steps", "batch_size", "eval_interval"):
            require_integer(name, getattr(self, name), 1)
        require_integer("seed", self.seed, 0)
        require_integer("warmup", self.warmup, 0)
        require_integer("anchor_interval", self.anchor_interval, 0)
        require_integer("vq_start", self.vq_start, 0, self.steps - 1)
        require(self.lr > 0 and math.isfinite(self.lr), "lr", self.lr, "must be positive and finite")
        for name in ("min_lr_ratio", "beta1", "beta2"):
            value = getattr(self, name)
            upper = 1 if name == "min_lr_ratio" else 1 - 1e-12
            require(
                0 <= value <= upper, name, value, "must be in [0, 1]" if upper == 1 else "must be in [0, 1)"
            )
        for name in ("weight_decay", "grad_clip"):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), name, value, "must be finite and not negative")
        require_choice("precision", self.precision, PRECISIONS)


# tiny: tests and live cells; cpu and gpu: nanoGPT's published character configurations.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "dropout": 0.0},
        {"batch_size": 8, "steps": 300, "warmup": 30, "eval_interval": 100},
    ),
    "cpu": (
        {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0},
        {"batch_size": 12, "steps": 2000, "eval_interval": 500},
    ),
    "gpu": (
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2},
        {"batch_size": 64, "steps": 5000, "eval_interval": 250, "precision": "bfloat16", "compile": True},
    ),
}


def preset(
    name: str, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> tuple[LocalGPTConfig, TrainConfig]:
    """Return the configurations of preset ``name`` with the fields in ``model`` and ``train`` replaced.

    Raises:
        ValueError: For an unknown preset or field, or a value that the configurations refuse.
    """
    require_choice("preset", name, PRESETS)
    model_preset, train_preset = PRESETS[name]
    return (
        build(LocalGPTConfig, {**model_preset, **(model or {})}),
        build(TrainConfig, {**train_preset, **(train or {})}),
    )


def build(cls: type, values: dict[str, Any]) -> Any:
    """Return ``cls(**values)``, an unknown key raising ValueError with the known ones.

    Raises:
        ValueError: For an unknown key or a refused value.
    """
    defaults = {item.name: item.default for item in fields(cls)}
    for key in values:
        require(key in defaults, "field", key, "allowed are " + ", ".join(sorted(defaults)))
    return cls(**{key: _as_default(value, defaults[key]) for key, value in values.items()})


def _as_default(value: Any, default: Any) -> Any:
    """Return an integer as a float where the field is one: TOML and JSON write 1 for 1.0."""
    return float(value) if type(value) is int and isinstance(default, float) else value

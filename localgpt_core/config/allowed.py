"""What the fields of a model allow: the names of choices, and what one field needs of the others."""

from localgpt_core.rules import RULES, RuleOptions

__all__ = [
    "ATTENTION_MODES",
    "BETWEEN_LAYERS",
    "CODEBOOKS",
    "CODE_BACKWARDS",
    "CODE_NORMS",
    "FEEDBACK_SOURCES",
    "GELU_SURROGATES",
    "GRANULARITIES",
    "INSIDE_RULES",
    "LAYER_NORMS",
    "MOST_BITS",
    "ONLY_BOTTLENECK",
    "SIGMOID_BIASES",
    "SUBSPACES",
    "SUBSPACE_EMBEDDINGS",
    "WITH_BOTTLENECK",
    "WITH_CODES",
    "WITH_FIXED_FEEDBACK",
    "WITH_SIGMOID",
    "WITH_SOFTMAX",
    "WITH_TANGENTS",
]

ATTENTION_MODES = ("sigmoid", "softmax")
SIGMOID_BIASES = ("neg_log_n", "zero", "learned")
GRANULARITIES = ("layer", "sublayer", "block")
INSIDE_RULES = {
    "bp": {},
    "grape": {"method": "fa", "fa_grape": True},
    "kp": {"method": "kp", "fa_grape": True, "fa_grape_update": "kaczmarz"},
}
FEEDBACK_SOURCES = ("random", "head")
LAYER_NORMS = ("bp", "ste", "center_scale", "projected", "scale", "none")
GELU_SURROGATES = ("identity", "relu", "steps")
CODEBOOKS = ("random", "kmeans")
CODE_NORMS = ("token", "fixed")
CODE_BACKWARDS = ("identity", "tangent", "rotation")
MOST_BITS = 8  # of a number that is rounded
SUBSPACES = ("project", "constrain")
SUBSPACE_EMBEDDINGS = ("free", "constrain")

WITH_SIGMOID = (
    "has no effect with attn_mode='softmax'; needs attn_mode='sigmoid'",
    lambda config: config.attn_mode == "sigmoid",
)
WITH_SOFTMAX = ("needs attn_mode='softmax'", lambda config: config.attn_mode == "softmax")
WITH_CODES = ("has no effect without vq_codes", lambda config: config.vq_codes > 0)
BETWEEN_LAYERS = (
    "needs dfa_granularity='sublayer' or 'block'",
    lambda config: config.dfa_granularity != "layer",
)
WITH_TANGENTS = (
    "needs groups of at least 2 units: of one unit, all of the gradient is radial",
    lambda config: config.vq_backward != "tangent" or config.vq_groups < config.n_embd,
)
WITH_BOTTLENECK = (
    "has no effect without resid_topk, vq_codes, subspace_rank or resid_bits",
    lambda config: config.narrows_stream,
)
ONLY_BOTTLENECK = (
    "must be the only bottleneck: resid_topk, vq_codes and subspace_rank must be 0",
    lambda config: not (config.resid_topk or config.vq_codes or config.subspace_rank),
)


def _feedback_stays(options: RuleOptions) -> bool:
    rule = RULES[options.method](options)
    return rule.aligns == "no" and not rule.mirrors_gradient


WITH_FIXED_FEEDBACK = (
    "needs a rule whose feedback stays as it is drawn, as here it is read",
    _feedback_stays,
)

"""The tables of cases that several test files share, and the small helpers they need.

Every dimension has another size, and parameters are moved off their start: two shapes or two parameters that
are mixed up then show.
"""

import torch
from torch import Tensor

from localgpt_core import RULES, LocalGPT, LocalGPTConfig, LocalLinear, RuleOptions

# Batch, time, block size, vocabulary, blocks, heads (3, of width 4), width, hidden width (48): all different.
B, T = 2, 5
SIZES = {"block_size": 6, "vocab_size": 7, "n_layer": 2, "n_head": 3, "n_embd": 12, "dropout": 0.0}

# Every registered rule, so that a new one is tested without a change here, and options of the old ones.
RULE_CASES: dict[str, dict] = {name: {"method": name} for name in RULES} | {
    "fa-orthogonal": {"method": "fa", "fa_init_mode": "orthogonal"},
    "fa-ortho_he": {"method": "fa", "fa_init_mode": "ortho_he"},
    "fa-sparse": {"method": "fa", "fa_init_mode": "sparse", "fa_sparse_k": 2},
    "fa-grape": {"method": "fa", "fa_grape": True},
    "dfa-orthogonal": {"method": "dfa", "fa_init_mode": "orthogonal"},
    "dfa-sparse": {"method": "dfa", "fa_init_mode": "sparse"},
    "fa-kaczmarz": {"method": "fa", "fa_grape": True, "fa_grape_update": "kaczmarz", "fa_grape_n_probe": 5},
    "fa-grape-start": {"method": "fa", "fa_grape": True, "fa_grape_start": 3},
    "sign_sym-random": {"method": "sign_sym", "sign_magnitude": "random"},
    "sign_sym-weight": {"method": "sign_sym", "scale_follows": "weight"},
    "sign_sym-probes": {"method": "sign_sym", "scale_follows": "probes"},
    "sign_sym-random-probes": {
        "method": "sign_sym",
        "sign_magnitude": "random",
        "scale_follows": "probes",
        "scale_n_probe": 5,
    },
    "fa-weight": {"method": "fa", "scale_follows": "weight"},
    "fa-probes": {"method": "fa", "scale_follows": "probes"},
    "dfa-grape": {"method": "dfa", "fa_grape": True},
    "dfa-fdfa": {"method": "dfa", "fa_grape": True, "jvp_update": "fdfa"},
    "dfa-sublayer": {"method": "dfa", "dfa_granularity": "sublayer"},
    "dkp-sublayer": {"method": "dkp", "dfa_granularity": "sublayer", "dfa_norm": True},
    "dkp-inside": {"method": "dkp", "dfa_granularity": "block", "dfa_norm": True, "dfa_inside": "kp"},
    "dfa-block": {"method": "dfa", "dfa_granularity": "block"},
    "dfa-block-norm": {"method": "dfa", "dfa_granularity": "block", "dfa_norm": True},
    "dfa-block-inside-grape": {"method": "dfa", "dfa_granularity": "block", "dfa_inside": "grape"},
    "dfa-block-inside-kp": {"method": "dfa", "dfa_granularity": "block", "dfa_inside": "kp"},
    "dfa-block-norm-grape": {
        "method": "dfa",
        "dfa_granularity": "block",
        "dfa_norm": True,
        "fa_grape": True,
    },
}

MODEL_CASES: dict[str, dict] = {
    "sigmoid": {},
    "softmax": {"attn_mode": "softmax"},
    "bias": {"bias": True},
    "softmax-bias": {"attn_mode": "softmax", "bias": True},
    "gates": {"gated_blocks": True},
    "bias-zero": {"sigmoid_bias_mode": "zero"},
    "bias-learned": {"sigmoid_bias_mode": "learned"},
    "ste_sigmoid": {"ste_sigmoid": True},
    "ste_gelu": {"ste_gelu": True},
    "gelu-relu": {"ste_gelu": True, "gelu_surrogate": "relu"},
    "gelu-steps": {"ste_gelu": True, "gelu_surrogate": "steps"},
    "freeze_emb": {"freeze_emb": True},
    "ln-ste": {"ln_mode": "ste"},
    "ln-center_scale": {"ln_mode": "center_scale"},
    "ln-projected": {"ln_mode": "projected"},
    "ln-scale": {"ln_mode": "scale"},
    # One block: off their start, nothing holds the values of two.
    "ln-none": {"ln_mode": "none", "n_layer": 1},
    "fused": {"attn_mode": "softmax", "fuse_attn_local": True},
    "mlp_topk": {"mlp_topk": 9},
    "resid_topk": {"resid_topk": 5},
    "vq": {"vq_codes": 11},
    "vq-per-block": {"vq_codes": 11, "vq_shared": False},
    "vq-tangent": {"vq_codes": 5, "vq_groups": 3, "vq_backward": "tangent"},
    "vq-rotation": {"vq_codes": 5, "vq_groups": 4, "vq_rms": "fixed", "vq_backward": "rotation"},
    "vq-fixed": {"vq_codes": 11, "vq_rms": "fixed", "vq_backward": "tangent", "vq_shared": False},
    "resid_bits": {"resid_bits": 4},
    "subspace": {"subspace_rank": 4},
    "subspace-constrain": {"subspace_rank": 4, "subspace_mode": "constrain"},
    "subspace-practised": {
        "subspace_rank": 4,
        "subspace_mode": "constrain",
        "subspace_embeddings": "constrain",
        "bottleneck_at": "0",
    },
    "bottleneck-first": {"resid_topk": 5, "vq_codes": 11, "subspace_rank": 8, "bottleneck_at": "0"},
    "gates-rezero": {"gated_blocks": True, "gate_start": 0.0},
    "everything-sigmoid": {
        "bias": True,
        "gated_blocks": True,
        "sigmoid_bias_mode": "learned",
        "ste_sigmoid": True,
        "ste_gelu": True,
        "ln_mode": "center_scale",
        "mlp_topk": 9,
        "resid_topk": 10,
        "vq_codes": 11,
        "subspace_rank": 4,
    },
    "everything-softmax": {
        "attn_mode": "softmax",
        "fuse_attn_local": True,
        "bias": True,
        "gated_blocks": True,
        "ln_mode": "ste",
        "freeze_emb": True,
        "mlp_topk": 9,
        "resid_topk": 10,
        "subspace_rank": 8,
    },
}

# Fields of a rule that moves its feedback: the options a field needs, and a value that is not its default.
GRAPE = {"method": "fa", "fa_grape": True}
NETWORK = {"method": "dfa", "fa_grape": True}
ALIGNMENT_FIELDS: dict[str, tuple[dict, object]] = {
    "fa_grape_head": (GRAPE, False),
    "fa_grape_update": (GRAPE, "kaczmarz"),
    "fa_grape_start": (GRAPE, 2),
    "jvp_update": (NETWORK, "fdfa"),
    "jvp_rate": (NETWORK, 0.5),
    "jvp_share": (NETWORK, 1.0),
    "sign_magnitude": ({"method": "sign_sym"}, "random"),
    "scale_follows": ({"method": "fa"}, "weight"),
    "scale_n_probe": ({"method": "sign_sym", "scale_follows": "probes"}, 3),
    "mirror_n_probe": ({"method": "wm"}, 3),
    "mirror_rate": ({"method": "wm"}, 0.5),
    "dfa_granularity": ({"method": "dfa"}, "block"),
    "dfa_norm": ({"method": "dfa", "dfa_granularity": "block"}, True),
    "dfa_source": ({"method": "dfa", "dfa_granularity": "block"}, "head"),
    "dfa_inside": ({"method": "dfa", "dfa_granularity": "sublayer"}, "grape"),
}


def off_start(module: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Move every parameter of ``module`` off its start, in place."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return module


def make_model(dtype: torch.dtype = torch.float64, seed: int = 1, **options) -> LocalGPT:
    """Return a small LocalGPT off its start."""
    torch.manual_seed(seed)
    return off_start(LocalGPT(LocalGPTConfig(**{**SIZES, **options})).to(dtype))


def make_batch(vocab_size: int = SIZES["vocab_size"], rows: int = B, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (rows, T)."""
    ids = torch.randint(vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def make_layer(
    in_features: int = 3, out_features: int = 2, error_features: int = 7, **options
) -> LocalLinear:
    """Return a float64 layer off its start; what is not the layer's own option is the rule's."""
    own = {name: options.pop(name) for name in ("bias", "is_output", "dtype") if name in options}
    own.setdefault("dtype", torch.float64)
    rule = RuleOptions(**options)
    return off_start(
        LocalLinear(in_features, out_features, options=rule, error_features=error_features, **own)
    )


def model_gradients(model: LocalGPT, idx: Tensor, targets: Tensor) -> dict[str, Tensor | None]:
    """Return the gradient of every parameter by name, None where none arrives."""
    model.zero_grad(set_to_none=True)
    model(idx, targets)[1].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def normal(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return seeded standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

"""Configurations: every field is checked, nothing is silently ignored, and whatever is accepted trains."""

import dataclasses
import math
import re
from dataclasses import fields

import pytest
import torch
from cases import ALIGNMENT_FIELDS, GRAPE, SIZES, make_batch, make_model, model_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from localgpt_core import RULES, LocalGPT, LocalGPTConfig, RuleOptions, RunSpec, TrainConfig
from localgpt_core.common.validation import require, require_choice, require_integer
from localgpt_core.config import PRESETS, build, preset
from localgpt_core.training.step import build_model, build_optimizer, learning_rate, training_step

SOFTMAX = {"attn_mode": "softmax"}
CONSTRAINED = {"subspace_rank": 3, "subspace_mode": "constrain"}
AT_BLOCKS = {"method": "dfa", "dfa_granularity": "block"}

# ------------------------------------------------------------ refusals

MODEL_REFUSALS = {
    "block_size": [({"block_size": 0}, "block_size=0: must be an integer of at least 1")],
    "vocab_size": [({"vocab_size": 6.5}, "vocab_size=6.5: must be an integer")],
    "n_layer": [({"n_layer": True}, "n_layer=True: must be an integer"), ({"n_layer": 0}, "n_layer=0")],
    "n_head": [({"n_head": -2}, "n_head=-2: must be an integer of at least 1")],
    "n_embd": [
        ({"n_embd": 13}, "n_embd=13: must be divisible by n_head=3"),
        ({"n_embd": 0}, "n_embd=0: must be an integer of at least 1"),
    ],
    "dropout": [
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1: must be in \[0, 1\)"),
        ({"dropout": math.nan}, r"dropout=nan: must be in \[0, 1\)"),
    ],
    "method": [({"method": "BP"}, "method='BP': allowed are 'bp', ")],
    "attn_mode": [({"attn_mode": "linear"}, "attn_mode='linear': allowed are 'sigmoid', 'softmax'")],
    "sigmoid_bias_mode": [
        ({"sigmoid_bias_mode": "one"}, "sigmoid_bias_mode='one': allowed are 'neg_log_n', 'zero', 'learned'"),
        ({"sigmoid_bias_mode": "zero", **SOFTMAX}, "sigmoid_bias_mode='zero': has no effect with attn_mode="),
    ],
    "gelu_surrogate": [
        ({"gelu_surrogate": "tanh", "ste_gelu": True}, "gelu_surrogate='tanh': allowed are 'identity', "),
        ({"gelu_surrogate": "relu"}, "gelu_surrogate='relu': has no effect without ste_gelu=True"),
    ],
    "vq_shared": [({"vq_shared": False}, "vq_shared=False: has no effect without vq_codes")],
    "vq_init": [
        ({"vq_init": "ones", "vq_codes": 3}, "vq_init='ones': allowed are 'random', 'kmeans'"),
        ({"vq_init": "kmeans"}, "vq_init='kmeans': has no effect without vq_codes"),
    ],
    "vq_groups": [
        ({"vq_groups": 0, "vq_codes": 3}, "vq_groups=0: must be an integer of at least 1 and at most 12"),
        ({"vq_groups": 13, "vq_codes": 3}, "vq_groups=13: must be an integer of at least 1 and at most 12"),
        ({"vq_groups": 5, "vq_codes": 3}, "vq_groups=5: must divide n_embd=12"),
        ({"vq_groups": 3}, "vq_groups=3: has no effect without vq_codes"),
    ],
    "vq_rms": [
        ({"vq_rms": "block", "vq_codes": 3}, "vq_rms='block': allowed are 'token', 'fixed'"),
        ({"vq_rms": "fixed"}, "vq_rms='fixed': has no effect without vq_codes"),
    ],
    "vq_backward": [
        (
            {"vq_backward": "exact", "vq_codes": 3},
            "vq_backward='exact': allowed are 'identity', 'tangent', 'rotation'",
        ),
        ({"vq_backward": "tangent"}, "vq_backward='tangent': has no effect without vq_codes"),
        (
            {"vq_backward": "tangent", "vq_codes": 3, "vq_groups": 12},
            "vq_backward='tangent': needs groups of at least 2 units",
        ),
    ],
    "resid_bits": [
        ({"resid_bits": 9}, "resid_bits=9: must be an integer of at least 0 and at most 8"),
        ({"resid_bits": -1}, "resid_bits=-1: must be an integer"),
        *(
            ({"resid_bits": 4, name: 2}, "resid_bits=4: must be the only bottleneck")
            for name in ("resid_topk", "vq_codes", "subspace_rank")
        ),
    ],
    "subspace_mode": [
        ({"subspace_mode": "cut", "subspace_rank": 3}, "subspace_mode='cut': allowed are 'project', "),
        ({"subspace_mode": "constrain"}, "subspace_mode='constrain': has no effect without subspace_rank"),
    ],
    "subspace_embeddings": [
        (
            {"subspace_embeddings": "cut", "subspace_rank": 3, "subspace_mode": "constrain"},
            "subspace_embeddings='cut': allowed are 'free', 'constrain'",
        ),
        (
            {"subspace_embeddings": "constrain", "subspace_rank": 3},
            "subspace_embeddings='constrain': needs subspace_mode='constrain'",
        ),
        (
            {"subspace_embeddings": "constrain", "freeze_emb": True} | CONSTRAINED,
            "subspace_embeddings='constrain': has no effect with freeze_emb=True",
        ),
    ],
    "gate_start": [
        ({"gate_start": 0.0}, "gate_start=0.0: has no effect without gated_blocks=True"),
        ({"gate_start": math.inf, "gated_blocks": True}, "gate_start=inf: must be finite"),
    ],
    "bottleneck_at": [
        ({"bottleneck_at": "0"}, "bottleneck_at='0': has no effect without resid_topk, vq_codes, subspace"),
        *(
            ({"bottleneck_at": at, "vq_codes": 3}, f"bottleneck_at={at!r}: must be ascending block numbers")
            for at in ("2", "1,0", "0,0", "00", "01", "\u0660", "a", "0;1", "-1", "0,", ",", " 1")
        ),
        ({"bottleneck_at": "0,1", "vq_codes": 3}, "bottleneck_at='0,1': are all blocks, which is written as"),
        (
            {"bottleneck_at": "1", "subspace_rank": 3, "subspace_mode": "constrain"},
            "bottleneck_at='1': must be the first blocks with subspace_mode='constrain'",
        ),
    ],
    "ste_sigmoid": [({"ste_sigmoid": True, **SOFTMAX}, "ste_sigmoid=True: has no effect with attn_mode=")],
    "fuse_attn_local": [({"fuse_attn_local": True}, "fuse_attn_local=True: needs attn_mode='softmax'")],
    "ln_mode": [
        ({"ln_mode": "rms"}, "ln_mode='rms': allowed are 'bp', 'ste', 'center_scale', 'projected', ")
    ],
    "mlp_topk": [
        ({"mlp_topk": 49}, "mlp_topk=49: .* at most 48"),
        ({"mlp_topk": -1}, "mlp_topk=-1: must be"),
    ],
    "resid_topk": [
        ({"resid_topk": 13}, "resid_topk=13: .* at most 12"),
        ({"resid_topk": 1.0}, "resid_topk=1"),
    ],
    "vq_codes": [({"vq_codes": -1}, "vq_codes=-1: must be an integer of at least 0")],
    "dfa_granularity": [
        ({"dfa_granularity": "token"}, "dfa_granularity='token': allowed are 'layer', 'sublayer', 'block'"),
        (
            {"method": "fa", "dfa_granularity": "block"},
            "dfa_granularity='block': has no effect with method='fa'; needs method dfa or dkp",
        ),
    ],
    "dfa_norm": [
        ({"dfa_norm": True, "method": "dfa"}, "dfa_norm=True: needs dfa_granularity='sublayer' or 'block'")
    ],
    "dfa_inside": [
        ({"dfa_inside": "fa"}, "dfa_inside='fa': allowed are 'bp', 'grape', 'kp'"),
        ({"dfa_inside": "grape", "method": "dfa"}, "dfa_inside='grape': needs dfa_granularity='sublayer'"),
    ],
    "dfa_source": [
        ({"dfa_source": "last"}, "dfa_source='last': allowed are 'random', 'head'"),
        (
            {"dfa_source": "head", "method": "dfa"},
            "dfa_source='head': needs dfa_granularity='sublayer' or 'block'",
        ),
        *(
            (
                {**AT_BLOCKS, "dfa_source": "head", **other},
                "dfa_source='head': needs a rule whose feedback stays",
            )
            for other in ({"method": "dkp"}, {"fa_grape": True})
        ),
        *(
            (
                {**AT_BLOCKS, "dfa_source": "head", **start},
                f"{[*start][0]}=.*: has no effect with dfa_source='head'",
            )
            for start in ({"feedback_std": 0.5}, {"feedback_seed": 3}, {"fa_init_mode": "orthogonal"})
        ),
    ],
    "subspace_rank": [({"subspace_rank": 13}, "subspace_rank=13: .* at least 0 and at most 12")],
    "fa_sparse_k": [
        (
            {"method": "fa", "fa_init_mode": "sparse", "fa_sparse_k": 13},
            "fa_sparse_k=13: .* at least 0 and at most 12",
        )
    ],
}
TRAIN_REFUSALS = {
    "seed": [
        ({"seed": -1}, "seed=-1: must be an integer of at least 0"),
        ({"seed": 1.0}, "seed=1.0: must be"),
    ],
    "steps": [({"steps": 0}, "steps=0: must be an integer of at least 1")],
    "batch_size": [({"batch_size": 0}, "batch_size=0: must be an integer of at least 1")],
    "eval_iters": [({"eval_iters": -1}, "eval_iters=-1: must be an integer of at least 0")],
    "eval_between": [
        ({"eval_between": -1}, "eval_between=-1: must be an integer of at least 0"),
        (
            {"eval_iters": 3, "eval_between": 3},
            "eval_between=3: is what eval_iters is, which is written as 0",
        ),
    ],
    "eval_interval": [({"eval_interval": 0}, "eval_interval=0: must be an integer of at least 1")],
    "anchor_interval": [
        ({"anchor_interval": -1}, "anchor_interval=-1: must be an integer of at least 0"),
        ({"anchor_interval": 2.0}, "anchor_interval=2.0: must be an integer"),
        (
            {"anchor_interval": 10, "steps": 9},
            "anchor_interval=10: must be an integer of at least 0 and at",
        ),
    ],
    "anchor_only": [
        ({"anchor_only": True}, "anchor_only=True: needs anchor_interval of at least 2"),
        (
            {"anchor_only": True, "anchor_interval": 1},
            "anchor_only=True: needs anchor_interval of at least 2",
        ),
    ],
    "noise_start": [({"noise_start": -1}, "noise_start=-1: must be an integer of at least 0")],
    "vq_start": [
        ({"vq_start": -1}, "vq_start=-1: must be an integer of at least 0"),
        ({"vq_start": 9, "steps": 9}, "vq_start=9: must be an integer of at least 0 and at most 8"),
    ],
    "freeze_blocks": [
        *(
            ({"freeze_blocks": at}, f"freeze_blocks={at!r}: must be ascending block numbers below 10000")
            for at in ("10000", "1,0", "0,0", "01", "\u0660", "a", "-1", "0,", ",", " 1")
        ),
        ({"freeze_blocks": 1}, "freeze_blocks=1: must be a string"),
        (
            {"freeze_blocks": "0", "freeze_body": True},
            "freeze_blocks='0': has no effect with freeze_body=True, which freezes every block",
        ),
    ],
    "warmup": [({"warmup": -1}, "warmup=-1: must be an integer of at least 0")],
    "lr": [({"lr": value}, f"lr={value}: must be positive and finite") for value in (0.0, -1.0, math.inf)],
    "min_lr_ratio": [
        ({"min_lr_ratio": value}, rf"min_lr_ratio={value}: must be in \[0, 1\]") for value in (1.5, -0.1)
    ],
    "beta1": [({"beta1": 1.0}, r"beta1=1.0: must be in \[0, 1\)")],
    "beta2": [({"beta2": math.nan}, r"beta2=nan: must be in \[0, 1\)"), ({"beta2": -0.1}, "beta2=-0.1")],
    "weight_decay": [({"weight_decay": -0.1}, "weight_decay=-0.1: must")],
    "grad_clip": [({"grad_clip": -1.0}, "grad_clip=-1.0: must"), ({"grad_clip": math.nan}, "grad_clip=nan")],
    "precision": [({"precision": "float16"}, "precision='float16': allowed are 'float64', 'float32', 'bf")],
}
# Switches without a value that could be wrong; the rule's own fields are in test_rules.py.
SWITCHES = {"bias", "ste_gelu", "freeze_emb", "gated_blocks", "freeze_body", "compile"}
OF_THE_RULES = set().union(*(rule.uses for rule in RULES.values()))


def refusals(table):
    return [
        pytest.param(*case, id=f"{name}-{i}") for name, cases in table.items() for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("options", "message"), refusals(MODEL_REFUSALS))
def test_a_model_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LocalGPTConfig(**{**SIZES, **options})


@pytest.mark.parametrize(("options", "message"), refusals(TRAIN_REFUSALS))
def test_a_run_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_every_field_is_checked():
    model = {item.name for item in fields(LocalGPTConfig)}
    assert model - OF_THE_RULES - SWITCHES == set(MODEL_REFUSALS) - {"fa_sparse_k"}
    assert {item.name for item in fields(TrainConfig)} - SWITCHES == set(TRAIN_REFUSALS)


@pytest.mark.parametrize("cls", [LocalGPTConfig, TrainConfig])
def test_every_field_says_what_it_does(cls):
    assert all(item.metadata["help"].strip() for item in fields(cls))


def test_the_defaults_are_those_of_the_original():
    expected = {
        "block_size": 256,
        "vocab_size": 65,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "bias": False,
        "attn_mode": "sigmoid",
        "sigmoid_bias_mode": "neg_log_n",
        "method": "bp",
        "ste_sigmoid": False,
        "ste_gelu": False,
        "freeze_emb": False,
        "ln_mode": "bp",
        "fuse_attn_local": False,
        "mlp_topk": 0,
        "resid_topk": 0,
        "vq_codes": 0,
        "subspace_rank": 0,
        "fa_init_mode": "gaussian",
        "fa_sparse_k": 0,
        "fa_grape": False,
        "fa_grape_n_probe": 32,
        "gated_blocks": False,
    }
    config = LocalGPTConfig()
    assert {name: getattr(config, name) for name in expected} == expected


def test_configurations_take_keywords_and_do_not_change():
    with pytest.raises(TypeError, match="positional"):
        LocalGPTConfig(256)
    with pytest.raises(AttributeError, match="cannot assign"):
        LocalGPTConfig().n_layer = 3


TOGETHER = {
    "anchors of exact steps": ({}, {"anchor_interval": 5}, "anchor_interval=5: has no effect where every"),
    "a frozen block that is not there": (
        {},
        {"freeze_blocks": "0,2"},
        "freeze_blocks='0,2': must be ascending block numbers below 2",
    ),
    "a late start of no codebook": ({}, {"vq_start": 3}, "vq_start=3: has no effect without vq_codes"),
    # 32 batches of 2 windows of 6 characters, in the streams of 2 blocks.
    "too many shared codes": (
        {"vq_codes": 769, "vq_init": "kmeans"},
        {"batch_size": 2},
        "vq_codes=769: k-means has 768 tokens to fit them to",
    ),
    "too many codes of one block": (
        {"vq_codes": 385, "vq_init": "kmeans", "vq_shared": False},
        {"batch_size": 2},
        "vq_codes=385: k-means has 384 tokens",
    ),
    "too many codes where one block has them": (
        {"vq_codes": 385, "vq_init": "kmeans", "bottleneck_at": "1"},
        {"batch_size": 2},
        "vq_codes=385: k-means has 384 tokens",
    ),
}


@pytest.mark.parametrize(("model", "train", "message"), TOGETHER.values(), ids=TOGETHER)
def test_what_two_configurations_do_not_allow_together_is_refused_when_a_run_is_specified(
    model, train, message
):
    model, train = LocalGPTConfig(**{**SIZES, **model}), TrainConfig(**train)
    with pytest.raises(ValueError, match=message):
        RunSpec(model, train, "toy", "0")
    with pytest.raises(ValueError, match=message):
        build_model(model, train)
    if model.vq_codes:
        RunSpec(dataclasses.replace(model, vq_codes=model.vq_codes - 1), train, "toy", "0")


INEXACT = [
    {"method": "fa"},
    {"method": "dfa"},
    {"ste_sigmoid": True},
    {"ste_gelu": True},
    {"vq_codes": 8},
    {"ln_mode": "scale"},
    {"ln_mode": "ste"},
]


@pytest.mark.parametrize("options", INEXACT, ids=str)
def test_anchors_are_allowed_wherever_some_derivative_is_not_exact(options):
    model = LocalGPTConfig(**SIZES, **options)
    assert not model.is_exact
    build_model(model, TrainConfig(anchor_interval=5))


# ------------------------------------------------------------ views


def test_the_rule_has_its_own_options_and_nothing_else():
    config = LocalGPTConfig(**SIZES, method="fa", fa_grape=True, feedback_std=0.5)
    assert type(config.rule) is RuleOptions
    assert config.rule == RuleOptions(method="fa", fa_grape=True, feedback_std=0.5)
    assert config.inside_rule == config.rule
    for layer in LocalGPT(config).local_linears():
        assert type(layer.rule.options) is RuleOptions and layer.rule.options == config.rule


def test_the_rule_inside_is_what_dfa_inside_names_and_its_feedback_starts_alike():
    start = {"fa_init_mode": "sparse", "fa_sparse_k": 3, "feedback_std": 0.5, "feedback_seed": 7}
    direct = {"method": "dfa", "dfa_granularity": "block"}
    inside = {
        name: LocalGPTConfig(**SIZES, **direct, **start, dfa_inside=name).inside_rule
        for name in ("bp", "grape", "kp")
    }
    assert inside["bp"] == RuleOptions()
    assert inside["grape"] == RuleOptions(method="fa", fa_grape=True, **start)
    assert inside["kp"] == RuleOptions(method="kp", fa_grape=True, fa_grape_update="kaczmarz", **start)


def test_the_start_of_the_feedback_holds_inside_too():
    rms = {}
    for std in (0.02, 0.5):
        model = make_model(method="dfa", dfa_granularity="block", dfa_inside="grape", feedback_std=std)
        rms[std] = model.blocks[0].mlp.fc.feedback_weight.square().mean().sqrt()
    assert rms[0.5] == pytest.approx(25 * rms[0.02].item())


# ------------------------------------------------------------ nothing is ignored

# Field: the other options, and a value that must make a difference to them.
DIFFERENCES = {
    "block_size": ({}, 9),
    "vocab_size": ({}, 8),
    "n_layer": ({}, 3),
    "n_head": ({}, 2),
    "n_embd": ({}, 15),
    "dropout": ({}, 0.5),
    "bias": ({}, True),
    "attn_mode": ({}, "softmax"),
    "sigmoid_bias_mode": ({}, "zero"),
    "method": ({}, "fa"),
    "ste_sigmoid": ({}, True),
    "ste_gelu": ({}, True),
    "gelu_surrogate": ({"ste_gelu": True}, "steps"),
    "vq_shared": ({"vq_codes": 5}, False),
    "vq_groups": ({"vq_codes": 5}, 3),
    "vq_rms": ({"vq_codes": 5}, "fixed"),
    "vq_backward": ({"vq_codes": 5}, "rotation"),
    "resid_bits": ({}, 3),
    "subspace_mode": ({"subspace_rank": 5}, "constrain"),
    "subspace_embeddings": (CONSTRAINED, "constrain"),
    "bottleneck_at": ({"vq_codes": 5}, "1"),
    "gate_start": ({"gated_blocks": True}, 0.5),
    "freeze_emb": ({}, True),
    "ln_mode": ({}, "center_scale"),
    "fuse_attn_local": ({**SOFTMAX, "dropout": 0.5}, True),
    "mlp_topk": ({}, 5),
    "resid_topk": ({}, 5),
    "vq_codes": ({}, 5),
    "subspace_rank": ({}, 5),
    "gated_blocks": ({}, True),
    "fa_init_mode": ({"method": "fa"}, "orthogonal"),
    "fa_sparse_k": ({"method": "dfa", "fa_init_mode": "sparse"}, 5),
    "feedback_std": ({"method": "dfa"}, 0.1),
    "feedback_seed": ({"method": "fa"}, 3),
    "fa_grape": ({"method": "fa"}, True),
    "fa_grape_n_probe": (GRAPE, 3),
    "fa_grape_lr": (GRAPE, 0.5),
    **ALIGNMENT_FIELDS,
}


# What a run does with the model: the codebook is fitted to the text of its batches, see test_run_state.
IN_RUNS = {"vq_init"}


def test_every_field_is_in_the_table_of_differences():
    assert set(DIFFERENCES) | IN_RUNS == {item.name for item in fields(LocalGPTConfig)}


@pytest.mark.parametrize("field", DIFFERENCES)
def test_no_field_is_ignored(field):
    others, value = DIFFERENCES[field]
    seen = []
    for options in (others, others, {**others, field: value}):
        model = make_model(**options)
        idx, targets = make_batch()
        for key in range(1 + model.config.fa_grape_start):
            model.align_feedback("probes", key, idx=idx)
        torch.manual_seed(0)
        gradients = model_gradients(model, idx, targets)
        seen.append({name: None if g is None else g.tolist() for name, g in gradients.items()})
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


# ------------------------------------------------------------ whatever is accepted works

NAMES = {item.name for item in fields(LocalGPTConfig)}
few = st.integers(-1, 7)
TINY = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 6),
        "vocab_size": st.integers(1, 8),
        "n_layer": st.integers(1, 2),
        "n_head": st.integers(1, 3),
        "n_embd": st.sampled_from([1, 2, 6, 7, 12]),
        "dropout": st.sampled_from([0.0, 0.3]),
        "method": st.sampled_from(sorted(RULES)),
        "attn_mode": st.sampled_from(["sigmoid", "softmax"]),
    }
)
OPTIONS = {
    "bias": st.booleans(),
    "sigmoid_bias_mode": st.sampled_from(["neg_log_n", "zero", "learned"]),
    "ste_sigmoid": st.booleans(),
    "ste_gelu": st.booleans(),
    "freeze_emb": st.booleans(),
    "ln_mode": st.sampled_from(["bp", "ste", "center_scale", "projected", "scale", "none"]),
    "gelu_surrogate": st.sampled_from(["identity", "relu", "steps"]),
    "vq_shared": st.booleans(),
    "vq_init": st.sampled_from(["random", "kmeans"]),
    "vq_groups": few,
    "vq_rms": st.sampled_from(["token", "fixed"]),
    "vq_backward": st.sampled_from(["identity", "tangent", "rotation"]),
    "resid_bits": few,
    "subspace_mode": st.sampled_from(["project", "constrain"]),
    "subspace_embeddings": st.sampled_from(["free", "constrain"]),
    "bottleneck_at": st.sampled_from(["", "0", "1", "0,1", "2"]),
    "gate_start": st.sampled_from([1.0, 0.0]),
    "fuse_attn_local": st.booleans(),
    "mlp_topk": few,
    "resid_topk": few,
    "vq_codes": few,
    "subspace_rank": few,
    "gated_blocks": st.booleans(),
    "fa_init_mode": st.sampled_from(["gaussian", "orthogonal", "ortho_he", "sparse"]),
    "fa_sparse_k": few,
    "feedback_std": st.sampled_from([0.02, 0.5, 0.0]),
    "feedback_seed": st.none() | few,
    "fa_grape": st.booleans(),
    "fa_grape_n_probe": few,
    "fa_grape_lr": st.sampled_from([1.0, 0.5, 2.0, 3.0]),
    "fa_grape_head": st.booleans(),
    "fa_grape_update": st.sampled_from(["cosine", "kaczmarz", "newton"]),
    "fa_grape_start": few,
    "jvp_update": st.sampled_from(["grape", "fdfa"]),
    "jvp_rate": st.sampled_from([0.05, 1.0, 0.0]),
    "jvp_share": st.sampled_from([0.5, 1.0, 0.0]),
    "sign_magnitude": st.sampled_from(["uniform", "random"]),
    "scale_follows": st.sampled_from(["start", "weight", "probes", "signs"]),
    "scale_n_probe": few,
    "mirror_n_probe": few,
    "mirror_rate": st.sampled_from([0.1, 1.0, 2.0]),
    "dfa_granularity": st.sampled_from(["layer", "sublayer", "block"]),
    "dfa_norm": st.booleans(),
    "dfa_inside": st.sampled_from(["bp", "grape", "kp"]),
    "dfa_source": st.sampled_from(["random", "head"]),
}


def test_the_examples_know_every_field():
    drawn = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "method", "attn_mode"}
    assert drawn | set(OPTIONS) == NAMES


@st.composite
def configurations(draw):
    """Draw sizes, a rule, and values for a few of the other fields, some of them wrong."""
    chosen = draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=5))
    return draw(TINY) | {name: draw(OPTIONS[name]) for name in sorted(chosen)}


def test_a_configuration_is_refused_by_name_or_trains():
    seen = {"refused": 0, "trained": 0}

    @settings(max_examples=300)
    @given(configurations())
    def check(options):
        try:
            config = LocalGPTConfig(**options)
        except ValueError as error:
            seen["refused"] += 1
            name = re.match(r"(\w+)=", str(error))
            assert name and name[1] in options, error
            return
        seen["trained"] += 1
        train_one_step(config)

    check()
    assert seen["refused"] > 60 and seen["trained"] > 60, seen


def train_one_step(config: LocalGPTConfig) -> None:
    torch.manual_seed(1)
    model = LocalGPT(config)
    train_config = TrainConfig(steps=2, warmup=0, lr=1e-2)
    optimizer = build_optimizer(model, train_config)
    ids = torch.randint(config.vocab_size, (2, config.block_size + 1))
    loss = training_step(model, optimizer, train_config, ids[:, :-1], ids[:, 1:], 0)
    assert loss.isfinite()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == model.untrained_parameters()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model(ids[:, :-1])[0].isfinite().all()


# ------------------------------------------------------------ build and preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations(name):
    model, train = preset(name)
    model_values, train_values = PRESETS[name]
    assert all(getattr(model, key) == value for key, value in model_values.items())
    assert all(getattr(train, key) == value for key, value in train_values.items())


def test_presets_of_nanogpt():
    model, train = preset("cpu")
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (4, 4, 128, 64)
    assert (model.dropout, train.batch_size, train.steps, train.lr) == (0.0, 12, 2000, 1e-3)
    model, train = preset("gpu")
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (6, 6, 384, 256)
    assert (model.dropout, train.batch_size, train.steps, train.lr) == (0.2, 64, 5000, 1e-3)
    assert (train.eval_interval, train.precision, train.compile) == (250, "bfloat16", True)


def test_a_preset_takes_other_values():
    model, train = preset("tiny", {"method": "fa", "n_layer": 1}, {"lr": 1})
    assert (model.method, model.n_layer, model.n_embd, train.lr) == ("fa", 1, 32, 1.0)
    assert isinstance(train.lr, float)
    assert PRESETS["tiny"][0]["n_layer"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("large",), "preset='large': allowed are 'tiny', 'cpu', 'gpu'"),
        (("tiny", {"n_heads": 2}), "field='n_heads': allowed are attn_mode, bias, block_size"),
        (("tiny", {}, {"epochs": 2}), "field='epochs': allowed are anchor_interval, anchor_only"),
        (("tiny", {"n_head": 5}), "n_embd=32: must be divisible by n_head=5"),
        (("tiny", {"bias": 1}), "bias=1: must be true or false"),
        (("tiny", {"bias": "true"}), "bias='true': must be true or false"),
        (("tiny", {"n_layer": True}), "n_layer=True: must be "),
        (("tiny", {"dropout": "0.1"}), "dropout='0.1': must be a number"),
        (("tiny", {"ln_mode": 3}), "ln_mode=3: must be a string"),
        (("tiny", {"n_layer": "2"}), "n_layer='2': must be an integer"),
    ],
    ids=str,
)
def test_presets_refuse_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


def test_build_makes_floats_of_integers_only_where_the_field_is_one():
    config = build(TrainConfig, {"weight_decay": 0, "steps": 3})
    assert isinstance(config.weight_decay, float) and isinstance(config.steps, int)


# ------------------------------------------------------------ validation and the learning rate


def test_a_refusal_names_field_value_and_what_is_allowed():
    require(True, "field", 1, "never said")
    with pytest.raises(ValueError, match=r"^size='x': must be even$"):
        require(False, "size", "x", "must be even")
    with pytest.raises(ValueError, match=r"^kind='c': allowed are 'a', 'b'$"):
        require_choice("kind", "c", iter(["a", "b"]))
    for value in (0, 5, 1.0, True, None, "1"):
        with pytest.raises(
            ValueError, match=f"^n={value!r}: must be an integer of at least 1 and at most 4$"
        ):
            require_integer("n", value, 1, 4)
    for value in (1, 4):
        require_integer("n", value, 1, 4)


def test_the_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=110, warmup=10, lr=2.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([2.0 * (s + 1) / 11 for s in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(110, config) == pytest.approx(0.2)
    assert learning_rate(0, TrainConfig(steps=1, warmup=0, lr=2.0)) == 2.0


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("fa_grape", "x", "true or false"),
        ("bias", None, "true or false"),
        ("ste_gelu", 1, "true or false"),
        ("dropout", "0.1", "a number"),
        ("feedback_std", True, "a number"),
        ("attn_mode", 3, "a string"),
    ],
)
def test_a_value_of_another_kind_is_refused_however_it_is_given(field, value, kind):
    for make in (lambda: LocalGPTConfig(**{field: value}), lambda: preset("tiny", {field: value})):
        with pytest.raises(ValueError, match=f"{field}={value!r}: must be {kind}"):
            make()

"""What the rules of the package declare and cost: here they are known by name, and worked out by hand."""

import pytest
import torch
from cases import RULE_CASES, T, make_batch, make_layer, make_model
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from localgpt_core import LocalGPT
from localgpt_core.config import preset
from localgpt_core.measure.cost import alignment_flops, step_flops

# error, what it reads of the weight, what moves the feedback by itself, trained copy, true derivative
DECLARED = {
    "bp": ("local", "weight", "no", False, True),
    "fa": ("local", "nothing", "no", False, False),
    "dfa": ("output", "nothing", "no", False, False),
    "sign_sym": ("local", "sign", "no", False, False),
    "kp": ("local", "nothing", "no", True, False),
    "wm": ("local", "nothing", "layer", False, False),
    "dkp": ("output", "nothing", "no", True, False),
}
MOVED_BY = {"fa-grape": "layer", "fa-kaczmarz": "layer", "dfa-grape": "network", "dfa-fdfa": "network"}
FOLLOWING = ["sign_sym-weight", "sign_sym-probes", "sign_sym-random-probes", "fa-weight", "fa-probes"]
MOVED_BY |= dict.fromkeys(FOLLOWING, "layer")


@pytest.mark.parametrize("name", DECLARED)
def test_what_a_rule_declares(name):
    rule = make_layer(method=name).rule
    found = (rule.error, rule.transports, rule.aligns, rule.mirrors_gradient, rule.is_derivative)
    assert found == DECLARED[name]
    assert rule.no_better_than_frozen == ""


@pytest.mark.parametrize("case", MOVED_BY)
def test_what_moves_the_feedback_with_probes(case):
    assert make_layer(**RULE_CASES[case]).rule.aligns == MOVED_BY[case]


@pytest.mark.parametrize(
    "case", ["fa-grape", "fa-kaczmarz", "dfa-grape", "dfa-fdfa", "wm", "fa-probes", "sign_sym-probes"]
)
def test_another_key_draws_other_probes(case):
    idx, buffers = make_batch()[0], []
    for key in (1, 2):
        model = make_model(**RULE_CASES[case])
        model.align_feedback("probes", key, idx=idx)
        buffers.append([layer.buffer for layer in model.local_linears()])
    assert not any(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


# ------------------------------------------------------------ products, counted by hand

# Two blocks of width 12: q, k, v and o 12 x 12, fc 48 x 12, proj 12 x 48; the head is 7 x 12.
INSIDE = 2 * (4 * 12**2 + 2 * 48 * 12)
WEIGHTS = INSIDE + 7 * 12
TOKENS = 10

# Multiply-adds of a step beyond those of backpropagation: for each token, and once to move the feedback.
BY_HAND = {
    "bp": (0, 0),
    "fa": (0, 0),
    "sign_sym": (0, 0),
    "kp": (0, 0),
    # An error of 7 meets inputs of 12 three times in a block, that of q, k and v once, and of 48 once; the
    # weights inside, never.
    "dfa": (2 * 7 * (3 * 12 + 48) - INSIDE, 0),
    # As backpropagation inside, and an error of 7 onto a stream of 12 at two points or four.
    "dfa-block": (2 * 7 * 12, 0),
    # Twice the products with the error: e^T x is as large as e B, and once for q, k and v too.
    "dkp": (2 * 2 * 7 * (3 * 12 + 48) - INSIDE, 0),
    "dkp-sublayer": (2 * 4 * 7 * 12, 0),
    "dfa-sublayer": (4 * 7 * 12, 0),
    # Noise: 32 inputs through W, and their correlation with the answers.
    "wm": (0, 2 * 32 * WEIGHTS),
    # 32 probes through W, through B, and their outer product with the error of the prediction.
    "fa-grape": (0, 3 * 32 * WEIGHTS),
    "fa-kaczmarz": (0, 3 * 5 * WEIGHTS),
    # One number of the weight, which no product gives; 32 probes through W, and for signs through these too.
    "sign_sym-weight": (0, 0),
    "fa-weight": (0, 0),
    "fa-probes": (0, 32 * WEIGHTS),
    "sign_sym-probes": (0, 2 * 32 * WEIGHTS),
    "sign_sym-random-probes": (0, 2 * 5 * WEIGHTS),
    # The head follows dfa, which has no probes here.
    "dfa-block-inside-grape": (2 * 7 * 12, 3 * 32 * INSIDE),
    # An input of 12 has no more than 12 directions to probe.
    "dfa-block-inside-kp": (2 * 7 * 12, 2 * 3 * (12 * (4 * 12**2 + 48 * 12) + 32 * 48 * 12)),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_products_of_a_step_by_hand(case):
    model, batch = make_model(**RULE_CASES[case]), make_batch()
    each, once = BY_HAND[case]
    assert step_flops(model, *batch) - step_flops(make_model(), *batch) == 2 * (TOKENS * each + once)
    assert alignment_flops(model, batch[0]) == 2 * once


def test_a_head_that_is_not_aligned_costs_no_probes():
    model = make_model(method="fa", fa_grape=True, fa_grape_head=False)
    assert alignment_flops(model, make_batch()[0]) == 2 * 3 * 32 * INSIDE
    rule = model.head.rule
    assert rule.align_flops(7, 12, is_output=True) == 0
    assert rule.align_flops(7, 12, is_output=False) == 2 * 3 * 32 * 7 * 12


# ------------------------------------------------------------ at the sizes of the presets


# Matmul FLOPs of a training step over backpropagation's at presets cpu and gpu: 1 is exact, the rest bounds.
RATIOS = {
    "bp": (1.0, 1.0),
    "fa": (1.0, 1.0),
    "fa-grape": (1.06, 1.06),
    "sign_sym": (1.0, 1.0),
    "dfa": (0.82, 0.75),
    "kp": (1.0, 1.0),
    "wm": (1.06, 1.06),
    "fa-kaczmarz": (1.06, 1.06),
    "sign_sym-random": (1.0, 1.0),
    "sign_sym-weight": (1.0, 1.0),
    "fa-weight": (1.0, 1.0),
    "sign_sym-probes": (1.06, 1.06),
    "fa-probes": (1.06, 1.06),
    "dfa-grape": (1.20, 1.10),
    "dfa-fdfa": (1.20, 1.10),
    "dfa-sublayer": (1.03, 1.01),
    "dfa-block": (1.02, 1.01),
    "dfa-block-norm": (1.02, 1.01),
    "dfa-block-inside-grape": (1.06, 1.06),
    "dfa-block-inside-kp": (1.06, 1.06),
    "dfa-block-norm-grape": (1.33, 1.33),
    "dkp": (0.88, 0.77),
    "dkp-sublayer": (1.06, 1.02),
    "dkp-inside": (1.07, 1.02),
}


def flops(model, rows: int) -> int:
    idx = torch.zeros(rows, model.config.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.align_feedback("flops", idx=idx)
        model(idx, idx)[1].backward()
    return counter.get_total_flops()


def flops_per_row(name: str, options: dict) -> float:
    model_config, train_config = preset(name, options)
    model = LocalGPT(model_config)
    if model.head.rule.aligns == "network":
        # Forward mode does not work on shapes alone; its cost is the same for every pair of sequences.
        return flops(model, 2) / 2
    # Shapes only: nothing is computed.
    with FakeTensorMode(allow_non_fake_inputs=True):
        return flops(model, train_config.batch_size) / train_config.batch_size


@pytest.fixture(scope="module")
def backprop_flops():
    return {name: flops_per_row(name, {"method": "bp"}) for name in ("cpu", "gpu")}


@pytest.mark.parametrize("preset_name", ["cpu", "gpu"])
@pytest.mark.parametrize("case", RATIOS)
def test_a_training_step_costs_its_share_of_backpropagation(case, preset_name, backprop_flops):
    declared = RATIOS[case][preset_name == "gpu"]
    ratio = flops_per_row(preset_name, RULE_CASES[case]) / backprop_flops[preset_name]
    if declared == 1.0:
        assert ratio == 1.0
    else:
        # A bound so loose that it says nothing would be no declaration.
        assert declared - 0.06 < ratio <= declared


def test_counting_on_shapes_is_counting():
    # By hand for one linear layer of the model's kind: forward, grad_weight and grad_input, 2 FLOPs each.
    layer = make_layer(3, 2, bias=False, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        x = torch.zeros(T, 3, requires_grad=True)
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * T * 3 * 2

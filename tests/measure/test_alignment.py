"""A rule against the exact gradient: what the numbers are, and that measuring leaves no trace."""

import math
import re

import pytest
import torch
from cases import MODEL_CASES, RULE_CASES, SIZES, make_batch, make_model, model_gradients, normal
from torch.nn import functional

from localgpt_core import (
    LayerNormProjectedSurrogate,
    LayerNormSTE,
    LocalGPT,
    LocalGPTConfig,
    VQResidualDir,
    alignment,
)
from localgpt_core.bottlenecks import HardTopK, UniformRounding, keep_winners
from localgpt_core.common.modes import exact_derivatives

# ------------------------------------------------------------ the numbers


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("case", ["sigmoid", "bias", "softmax", "ln-projected", "gates", "subspace"])
def test_backpropagation_is_aligned_with_itself(case, dropout):
    # With dropout only if both passes have the same mask.
    model = make_model(**MODEL_CASES[case], dropout=dropout).train()
    found = alignment(model, *make_batch())
    assert all(value == pytest.approx(1, abs=1e-12) for value in found.cosine.values())
    assert all(value == pytest.approx(1, abs=1e-12) for value in found.norm_ratio.values())
    assert found.total_cosine == pytest.approx(1, abs=1e-12) and found.descends
    assert found.rule_rms == pytest.approx(found.exact_rms, rel=1e-12)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("case", ["fa", "dfa", "kp", "sign_sym", "dfa-sublayer", "dfa-block-norm"])
def test_the_numbers_are_those_of_two_models(case):
    model, exact = make_model(**RULE_CASES[case]), make_model()
    idx, targets = make_batch()
    found = alignment(model, idx, targets)
    rule, true = model_gradients(model, idx, targets), model_gradients(exact, idx, targets)
    assert found.cosine == pytest.approx({name: cosine(rule[name], true[name]) for name in true}, abs=1e-10)
    ratios = {name: (rule[name].norm() / true[name].norm()).item() for name in true}
    assert found.norm_ratio == pytest.approx(ratios, rel=1e-10)
    assert found.exact_norm == pytest.approx({n: g.norm().item() for n, g in true.items()}, rel=1e-10)
    whole = [torch.cat([gradients[name].flatten() for name in true]) for gradients in (rule, true)]
    assert found.total_cosine == pytest.approx(cosine(*whole), abs=1e-10)
    assert found.descends == bool(whole[0] @ whole[1] > 0)
    table = found.table()
    assert list(table.columns) == ["parameter", "cosine", "norm ratio", "exact norm"]
    assert dict(zip(table["parameter"], table["cosine"], strict=True)) == found.cosine


@pytest.mark.parametrize("case", ["bp", "fa", "dfa"])
def test_the_stream_and_its_errors_equal_those_of_hooks(case):
    options, (idx, targets) = RULE_CASES[case], make_batch()

    def measured(model):
        outputs, sizes = [], []
        for block in model.blocks:
            block.register_forward_hook(lambda m, args, y: y.retain_grad() or outputs.append(y))
        model(idx, targets)[1].backward()
        for y in outputs:
            sizes.append([x.square().mean().sqrt().item() for x in (y.detach(), y.grad)])
        return sizes

    found = alignment(make_model(**options), idx, targets)
    rule, exact = measured(make_model(**options)), measured(make_model())
    assert found.residual_rms == pytest.approx([x for x, _ in rule], rel=1e-12)
    assert found.rule_rms == pytest.approx([g for _, g in rule], rel=1e-12)
    assert found.exact_rms == pytest.approx([g for _, g in exact], rel=1e-12)


def test_the_error_that_a_feedback_point_brings_is_measured_below_it():
    model = make_model(method="dfa", dfa_granularity="block")
    idx, targets = make_batch()
    error = torch.softmax(model(idx)[0], -1) - torch.eye(7, dtype=torch.float64)[targets]
    brought = [(error / idx.numel()) @ block.feedback.feedback_weight for block in model.blocks]
    expected = [x.square().mean().sqrt().item() for x in brought]
    assert alignment(model, idx, targets).rule_rms == pytest.approx(expected, rel=1e-10)


def test_an_uphill_rule_does_not_descend():
    model = make_model(method="fa")
    for layer in model.local_linears():
        layer.feedback_weight.copy_(layer.weight.detach() * (-1000 if layer is model.head else 1))
    found = alignment(model, *make_batch())
    assert found.cosine.pop("head.weight") == pytest.approx(1, abs=1e-12)
    assert all(value == pytest.approx(-1, abs=1e-12) for value in found.cosine.values())
    assert found.norm_ratio["tok_emb.weight"] == pytest.approx(1000, rel=1e-10)
    assert not found.descends and found.total_cosine < -0.5


# ------------------------------------------------------------ nothing where there is nothing to say


def test_a_gradient_that_is_zero_in_exact_arithmetic_is_not_a_number():
    found = alignment(make_model(attn_mode="softmax", bias=True, method="fa"), *make_batch())
    silent = {name for name, value in found.cosine.items() if math.isnan(value)}
    assert silent == {"blocks.0.attn.k_proj.bias", "blocks.1.attn.k_proj.bias"}
    assert silent == {name for name, value in found.norm_ratio.items() if math.isnan(value)}


def test_a_direction_that_is_zero_is_not_a_number():
    model = make_model(method="fa")
    model.head.feedback_weight.zero_()
    found = alignment(model, *make_batch())
    assert {name for name, value in found.cosine.items() if not math.isnan(value)} == {"head.weight"}
    assert found.norm_ratio["ln_f.weight"] == 0 and found.cosine["head.weight"] == pytest.approx(1)


def test_an_exact_gradient_at_the_numerical_floor_is_not_a_number():
    model = make_model(torch.float32, method="fa")
    with torch.no_grad():
        model.tok_emb.weight.mul_(1e9)
    found = alignment(model, *make_batch())
    assert all(math.isnan(found.cosine[name]) for name in ("tok_emb.weight", "pos_emb.weight"))
    assert found.cosine["head.weight"] == pytest.approx(1, abs=1e-5)
    assert found.residual_rms[0] > 1e8


class TwoNumbers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.large, self.small = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))


@pytest.mark.parametrize(("size", "says_something"), [(2e-6, True), (5e-7, False)])
def test_the_numerical_floor_is_eight_roundings_of_the_largest_gradient(size, says_something):
    model = TwoNumbers()
    found = alignment(model, None, None, loss=lambda: (100 * model.large + 100 * size * model.small).sum())
    assert found.cosine["large"] == found.norm_ratio["large"] == 1
    assert math.isnan(found.cosine["small"]) == math.isnan(found.norm_ratio["small"]) != says_something


def test_without_any_gradient_nothing_descends():
    model = TwoNumbers()
    found = alignment(model, None, None, loss=lambda: (0 * model.large).sum())
    assert found.exact_norm == {"large": 0.0, "small": 0.0}
    assert not found.descends and math.isnan(found.total_cosine)


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="model: has no parameter that requires a gradient"):
        alignment(make_model().requires_grad_(False), *make_batch())


@pytest.mark.parametrize("given", ["", "idx", "targets", "idx loss", "idx targets loss"])
def test_the_batch_or_the_loss_is_given_and_not_both(given):
    model, (idx, targets) = make_model(method="fa"), make_batch()
    every = {"idx": idx, "targets": targets, "loss": lambda: model(targets, idx)[1]}
    allowed = "allowed are idx and targets, or loss alone"
    with pytest.raises(ValueError, match=re.escape(f"given={given.split()!r}: {allowed}")):
        alignment(model, **{name: every[name] for name in given.split()})


def test_a_loss_of_ones_own_is_the_one_that_is_measured():
    model, (idx, targets) = make_model(method="fa"), make_batch()
    own = alignment(model, loss=lambda: model(targets, idx)[1])
    assert own == alignment(model, targets, idx) != alignment(model, idx, targets)


# ------------------------------------------------------------ no trace


def traces(model) -> dict:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "exact": ["exact" in vars(module) for module in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "random": torch.get_rng_state(),
    }


def assert_no_trace(before: dict, after: dict) -> None:
    for part in ("modes", "hooks", "exact"):
        assert before[part] == after[part], part
    assert not any(after["hooks"]) and not any(after["exact"])
    assert all(a is b for a, b in zip(before["grads"], after["grads"], strict=True))
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])
    assert torch.equal(before["random"], after["random"])


@pytest.mark.parametrize("case", ["bp", "fa-grape", "dfa-grape", "dfa-block"])
@pytest.mark.parametrize("grads", [True, False])
def test_measuring_leaves_the_model_alone(case, grads):
    model = make_model(**RULE_CASES[case], dropout=0.3)
    model.train()
    model.blocks[0].eval()
    if grads:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = traces(model)
    found = alignment(model, *make_batch())
    assert_no_trace(before, traces(model))
    assert all(parameter.grad is None or parameter.grad.eq(1).all() for parameter in model.parameters())
    torch.rand(3)
    assert alignment(model, *make_batch()) == found
    assert alignment(model, *make_batch(), seed=1) != found


@pytest.mark.parametrize("at_call", [1, 2])
def test_a_measurement_that_breaks_off_leaves_the_model_alone(at_call):
    model = make_model(method="dfa", dfa_granularity="block", dropout=0.3)
    idx, targets = make_batch()
    before, calls = traces(model), []

    def breaks():
        calls.append(1)
        if len(calls) == at_call:
            model(idx)
            raise ZeroDivisionError
        return model(idx, targets)[1]

    with pytest.raises(ZeroDivisionError):
        alignment(model, loss=breaks)
    assert_no_trace(before, traces(model))


# ------------------------------------------------------------ exact derivatives

SURROGATES = ["ste_sigmoid", "ste_gelu", "ln-ste", "ln-center_scale", "ln-projected", "fused", "mlp_topk"]
SURROGATES += ["resid_topk"]
PLAIN = {"ste_sigmoid": False, "ste_gelu": False, "ln_mode": "bp", "fuse_attn_local": False}


@pytest.mark.parametrize("method", ["bp", "dfa"])
@pytest.mark.parametrize("case", SURROGATES)
def test_exact_derivatives_are_those_of_the_plain_model(case, method):
    options = MODEL_CASES[case]
    model = make_model(**options, method=method)
    plain = make_model(**{key: PLAIN.get(key, value) for key, value in options.items()})
    names = {"ln.weight": "weight", "ln.bias": "bias", "bias_param": "bias"}
    state = {}
    for name, parameter in model.named_parameters():
        for old, new in names.items():
            name = name.removesuffix(old) + new if name.endswith("." + old) else name
        state[name] = parameter.detach()
    plain.load_state_dict(state, strict=True)
    idx, targets = make_batch()
    expected = model_gradients(plain, idx, targets)
    with exact_derivatives(model):
        found = model_gradients(model, idx, targets)
    for name, gradient in found.items():
        if gradient is not None:
            for old, new in names.items():
                name = name.removesuffix(old) + new if name.endswith("." + old) else name
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize(
    "module",
    [
        LayerNormSTE(6),
        LayerNormProjectedSurrogate(6, "center_scale"),
        LayerNormProjectedSurrogate(6, "projected"),
        VQResidualDir(6, 5),
        VQResidualDir(6, 5, groups=2, backward="tangent"),
        VQResidualDir(6, 5, groups=3, rms="fixed", backward="rotation"),
        UniformRounding(3),
    ],
    ids=lambda module: f"{type(module).__name__}-{getattr(module, 'mode', '')}",
)
def test_an_exact_module_keeps_its_values_and_passes_gradcheck(module):
    module = module.double()
    x = normal(4, 6).requires_grad_(True)
    before = module(x)
    with exact_derivatives(module):
        torch.testing.assert_close(module(x), before, rtol=1e-13, atol=1e-13)
        assert torch.autograd.gradcheck(module, (x,))
    assert "exact" not in vars(module) and torch.equal(module(x), before)


def test_the_exact_derivative_of_the_codebook_by_hand():
    vq, x, g = VQResidualDir(6, 5).double(), normal(4, 6).requires_grad_(True), normal(4, 6, seed=8)
    with exact_derivatives(vq):
        (found,) = torch.autograd.grad(vq(x), x, g)
    code = vq.codebook[vq.codes(x)]
    expected = (g * code).sum(-1, keepdim=True) * x / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


def test_winners_are_kept_in_the_same_way_by_both_operations():
    x, g = normal(5, 8), normal(5, 8, seed=9)
    x[0] = 1.0  # tied
    results = []
    for keep in (HardTopK.apply, keep_winners):
        leaf = x.clone().requires_grad_(True)
        y = keep(leaf, 3)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.autograd.gradcheck(lambda t: keep_winners(t, 3), (x[1:].clone().requires_grad_(True),))


def test_exact_derivatives_end_with_their_block_however_it_ends():
    torch.manual_seed(0)
    model = LocalGPT(LocalGPTConfig(**SIZES, ln_mode="ste", vq_codes=3))
    with pytest.raises(ZeroDivisionError), exact_derivatives(model):
        assert model.blocks[0].ln1.exact and model.head.exact and model.blocks[0].vq.exact
        raise ZeroDivisionError
    assert not any("exact" in vars(module) for module in model.modules())
    assert not model.head.exact

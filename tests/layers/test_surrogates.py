"""Local derivatives: two are exact, which gradcheck proves; the others are the formula they claim."""

import math

import pytest
import torch
from cases import B, T, make_batch, make_model, model_gradients, normal, off_start
from torch.autograd import gradcheck
from torch.nn import functional

from localgpt_core import (
    GELUSTE,
    LayerNormProjectedSurrogate,
    LayerNormSTE,
    LocalGPT,
    LocalGPTConfig,
    SigmoidSTE,
    SoftmaxValueMixLocalFn,
)
from localgpt_core.layers.norms import FixedNorm
from localgpt_core.layers.surrogates import GELUStepSurrogate, StraightThrough

C, D, S = 6, 3, 4


def gradient(function, x, grad_output):
    x = x.detach().clone().requires_grad_(True)
    return torch.autograd.grad(function(x), x, grad_output)[0]


# ------------------------------------------------------------ straight through


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("surrogate", "function"),
    [(SigmoidSTE, torch.sigmoid), (GELUSTE, functional.gelu)],
    ids=["sigmoid", "gelu"],
)
def test_straight_through_activations(surrogate, function, dtype):
    x, g = 3 * normal(B, T, C, dtype=dtype), normal(B, T, C, seed=1, dtype=dtype)
    assert torch.equal(surrogate.apply(x), function(x))
    assert torch.equal(gradient(surrogate.apply, x, g), g)
    assert not torch.allclose(gradient(function, x, g), g)


def test_the_gelu_is_the_exact_one():
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
    torch.testing.assert_close(GELUSTE.apply(x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "slopes"), [("relu", [0, 0, 0, 0, 1, 1, 1]), ("steps", [0, 0, 0.33, 0.33, 0.67, 0.67, 1])]
)
def test_step_surrogates_by_hand(mode, slopes, dtype):
    x = torch.tensor([-9.0, -0.45, -0.44, 0.0, 0.01, 0.44, 0.46], dtype=dtype)
    assert torch.equal(GELUStepSurrogate.apply(x, mode), functional.gelu(x))
    g = normal(7, dtype=dtype)
    found = gradient(lambda x: GELUStepSurrogate.apply(x, mode), x, g)
    assert found.dtype == dtype
    torch.testing.assert_close(found, g * torch.tensor(slopes, dtype=dtype), rtol=1e-2, atol=0)


def test_the_four_steps_are_the_least_squares_fit_that_they_claim_to_be():
    # The derivative of GELU, d(x) = Phi(x) + x phi(x), for standard normal x, on a fine grid.
    x = torch.linspace(-6, 6, 24001, dtype=torch.float64, requires_grad=True)
    (d,) = torch.autograd.grad(functional.gelu(x).sum(), x)
    x, density = x.detach(), torch.exp(-(x.detach() ** 2) / 2)

    def error(t, a):
        levels = torch.tensor([0, a, 1 - a, 1], dtype=torch.float64)
        cuts = torch.tensor([-t, 0, t], dtype=torch.float64)
        return ((d - levels[torch.bucketize(x, cuts)]).square() * density).sum() / density.sum()

    torch.testing.assert_close(d + d.flip(0), torch.ones_like(d))
    (low, middle, high), levels = GELUStepSurrogate.STEPS["steps"]
    assert (low, middle) == (-high, 0) and levels == pytest.approx((0, levels[1], 1 - levels[1], 1))
    best, relu, identity = error(high, levels[1]), error(0.0, 0.5), (d - 1).square().mul(density).sum()
    for t, a in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        assert error(high + t, levels[1] + a) > best
    assert best < relu / 4 and relu < identity / density.sum() / 4


def test_straight_through_passes_the_gradient_to_the_input_only():
    x, y = normal(B, C).requires_grad_(True), normal(B, C, seed=1).requires_grad_(True)
    g = normal(B, C, seed=2)
    output = StraightThrough.apply(x, y)
    assert torch.equal(output, y)
    dx, dy = torch.autograd.grad(output, (x, y), g, allow_unused=True)
    assert torch.equal(dx, g) and dy is None


def test_straight_through_sigmoid_keeps_masked_scores_out():
    # A change of a future token must not change any gradient of the past, either.
    model = make_model(ste_sigmoid=True, n_layer=1)
    idx, _ = make_batch()
    gradients = []
    for last in (1, 2):
        idx[:, -1] = last
        model.zero_grad()
        model(idx)[0][:, :-1].square().sum().backward()
        gradients.append(model.blocks[0].attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------ norms


NORMS = {
    "center_scale": lambda: LayerNormProjectedSurrogate(C, "center_scale"),
    "projected": lambda: LayerNormProjectedSurrogate(C, "projected"),
    "scale": lambda: LayerNormProjectedSurrogate(C, "scale"),
    "ste": lambda: LayerNormSTE(C),
}
every_norm = pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)


def affine(norm):
    """Return gamma and beta."""
    return (
        (norm.ln.weight, norm.ln.bias) if isinstance(norm, LayerNormSTE) else (norm.weight, norm.bias_param)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_norm
def test_the_forward_pass_is_layer_norm(build, dtype):
    norm = off_start(build().double()).to(dtype)
    x = (5 * normal(B, T, C) + 2).to(dtype)
    y = norm(x)
    expected = functional.layer_norm(x.double(), (C,), *(p.double() for p in affine(norm)), eps=1e-5)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit)


@every_norm
def test_norms_start_as_the_identity_of_the_normalised(build):
    gamma, beta = affine(build())
    assert torch.equal(gamma, torch.ones(C)) and torch.equal(beta, torch.zeros(C))


@pytest.mark.parametrize("mode", LayerNormProjectedSurrogate.MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_have_their_statistics_in_float32(mode, dtype):
    # Around 300 the squares overflow float16, and bfloat16 keeps one part in 256.
    x = (normal(T, C) * 20 + 300).to(dtype)
    y = LayerNormProjectedSurrogate(C, mode).to(dtype)(x)
    expected = functional.layer_norm(x.float(), (C,)).to(dtype)
    assert torch.equal(y, expected)


def test_projected_is_the_exact_jacobian():
    norm = off_start(LayerNormProjectedSurrogate(C, "projected").double())
    x = normal(B, T, C).requires_grad_(True)

    def function(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias_param": bias}, (x,))

    inputs = (x, norm.weight.detach().requires_grad_(True), norm.bias_param.detach().requires_grad_(True))
    assert gradcheck(function, inputs)


def test_center_scale_is_its_formula_and_not_the_exact_jacobian():
    norm = off_start(LayerNormProjectedSurrogate(C, "center_scale").double())
    x, g = normal(B, T, C), normal(B, T, C, seed=1)
    v = g * norm.weight.detach()
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (v - v.mean(-1, keepdim=True)) / sigma
    torch.testing.assert_close(gradient(norm, x, g), expected, rtol=1e-12, atol=1e-14)
    exact = gradient(lambda x: functional.layer_norm(x, (C,), norm.weight), x, g)
    # What it leaves out is the radial part only.
    z = (x - x.mean(-1, keepdim=True)) / sigma
    torch.testing.assert_close(expected - exact, z * (v * z).mean(-1, keepdim=True) / sigma)
    assert (expected - exact).norm() > 0.1 * exact.norm()


def test_scale_treats_the_statistics_as_constants():
    norm = off_start(LayerNormProjectedSurrogate(C, "scale").double())
    x, g = normal(B, T, C), normal(B, T, C, seed=1)

    def detached(x):
        variance, mean = torch.var_mean(x.detach(), -1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight.detach()

    torch.testing.assert_close(gradient(norm, x, g), gradient(detached, x, g), rtol=1e-12, atol=1e-14)
    centred = gradient(LayerNormProjectedSurrogate(C, "center_scale").double(), x, g)
    plain = gradient(LayerNormProjectedSurrogate(C, "scale").double(), x, g)
    torch.testing.assert_close(plain - plain.mean(-1, keepdim=True), centred, rtol=1e-12, atol=1e-14)
    assert (plain.mean(-1).abs() > 1e-3).any()


def test_the_fixed_norm_is_a_scaled_gain_with_its_true_derivative():
    norm = off_start(FixedNorm(C, 0.5).double())
    x = normal(B, T, C).requires_grad_(True)
    torch.testing.assert_close(norm(x), x / 0.5 * norm.weight + norm.bias, rtol=1e-12, atol=1e-14)
    # Nothing holds the scale: twice the input is twice the output, the bias aside.
    torch.testing.assert_close(norm(2 * x) - norm.bias, 2 * (norm(x) - norm.bias))
    assert gradcheck(norm, x)


def test_the_fixed_norm_starts_with_the_size_that_the_stream_starts_with():
    torch.manual_seed(0)
    model = LocalGPT(LocalGPTConfig(n_layer=1, n_head=2, n_embd=128, ln_mode="none", block_size=32))
    x = model.tok_emb.weight[:32] + model.pos_emb.weight
    assert model.blocks[0].ln1(x).square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_center_scale_by_hand():
    norm = LayerNormProjectedSurrogate(2, "center_scale").double()
    x = torch.tensor([[3.0, 7.0]], dtype=torch.float64)  # mean 5, sigma 2
    g = torch.tensor([[4.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, -1.0]], dtype=torch.float64) * 2 / math.sqrt(4 + 1e-5)
    torch.testing.assert_close(gradient(norm, x, g), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", LayerNormProjectedSurrogate.MODES)
def test_gamma_and_beta_get_their_true_gradients(mode):
    norm, exact = off_start(LayerNormProjectedSurrogate(C, mode).double()), torch.nn.LayerNorm(C).double()
    exact.load_state_dict({"weight": norm.weight, "bias": norm.bias_param})
    x, g = normal(B, T, C), normal(B, T, C, seed=1)
    norm(x).backward(g)
    exact(x).backward(g)
    torch.testing.assert_close(norm.weight.grad, exact.weight.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm.bias_param.grad, exact.bias.grad, rtol=1e-12, atol=1e-14)


def test_layer_norm_ste_passes_the_gradient_and_trains_nothing():
    norm = off_start(LayerNormSTE(C).double())
    x, g = normal(B, T, C), normal(B, T, C, seed=1)
    assert torch.equal(gradient(norm, x, g), g)
    assert all(not p.requires_grad and p.grad is None for p in norm.parameters())
    assert norm(x).requires_grad is False


def test_the_norms_mode_is_checked():
    with pytest.raises(ValueError, match="mode='ste': allowed are 'center_scale', 'projected', 'scale'"):
        LayerNormProjectedSurrogate(C, "ste")


@pytest.mark.parametrize("mode", ["center_scale", "projected", "scale", "ste"])
def test_norms_under_autocast(mode):
    model = make_model(torch.float32, ln_mode=mode)
    idx, targets = make_batch()
    exact = model_gradients(model, idx, targets)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - exact[name]).norm() < 0.06 * exact[name].norm() + 1e-4, name


# ------------------------------------------------------------ fused softmax


def masked_scores(dtype=torch.float64):
    future = torch.ones(T, S, dtype=torch.bool).triu(1)
    return normal(B, T, S, dtype=dtype).masked_fill(future, -torch.inf), future


def test_the_softmax_value_rule_is_exact():
    _, future = masked_scores()

    def function(scores, value):
        return SoftmaxValueMixLocalFn.apply(scores.masked_fill(future, -torch.inf), value)

    inputs = (normal(B, T, S).requires_grad_(True), normal(B, S, D, seed=1).requires_grad_(True))
    assert gradcheck(function, inputs)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_the_fused_softmax_equals_the_plain_one(dtype, limit):
    scores, future = masked_scores(dtype)
    value, g = normal(B, S, D, seed=1, dtype=dtype), normal(B, T, D, seed=2, dtype=dtype)
    results = []
    for mix in (SoftmaxValueMixLocalFn.apply, lambda s, v: torch.softmax(s, -1) @ v):
        s, v = scores.clone().requires_grad_(True), value.clone().requires_grad_(True)
        output = mix(s, v)
        results.append([output.detach(), *torch.autograd.grad(output, (s, v), g)])
    for fused, plain in zip(*results, strict=True):
        assert fused.dtype == dtype and fused.isfinite().all()
        torch.testing.assert_close(fused, plain, rtol=limit, atol=limit)
    assert not results[0][1].masked_select(future).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fused_model_equals_the_plain_model(dtype):
    idx, targets = make_batch()
    plain = model_gradients(make_model(dtype, attn_mode="softmax"), idx, targets)
    fused = model_gradients(make_model(dtype, attn_mode="softmax", fuse_attn_local=True), idx, targets)
    limit = {"rtol": 1e-11, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-7}
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name], expected, **limit)


def test_the_fused_model_under_autocast():
    model = make_model(torch.float32, attn_mode="softmax", fuse_attn_local=True)
    idx, targets = make_batch()
    exact = model_gradients(model, idx, targets)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - exact[name]).norm() < 0.06 * exact[name].norm() + 1e-4, name

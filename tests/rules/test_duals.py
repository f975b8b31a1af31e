"""Forward mode by lean formulas: torch's values and tangents, without the work on tangents of zeros."""

import pytest
import torch
from cases import make_batch, make_model
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from localgpt_core.matrices.duals import FORMULAS, LeanForwardMode
from localgpt_core.matrices.jacobian import jvp_estimates


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W, B, G = normal(2, 3, 4), normal(5, 4, seed=1), normal(5, seed=2), normal(4, seed=3)
SQUARE = normal(3, 3, seed=4)

# What is called with the dual tensors of x, and of another tensor where the formula has two.
CALLS = {
    "linear": (functional.linear, lambda x, _: functional.linear(x, W)),
    "linear, bias": (functional.linear, lambda x, _: functional.linear(x, W, B)),
    "linear, bias by name": (functional.linear, lambda x, _: functional.linear(x, W, bias=B)),
    "times a tensor": (torch.Tensor.mul, lambda x, _: x * G),
    "times a number": (torch.Tensor.mul, lambda x, _: x * 3.0),
    "over": (torch.Tensor.div, lambda x, _: x / G),
    "baddbmm": (torch.baddbmm, lambda x, y: torch.baddbmm(SQUARE, x, y.mT, alpha=0.3)),
    "layer_norm": (functional.layer_norm, lambda x, _: functional.layer_norm(x, (4,), G, G + 1, eps=1e-3)),
    "layer_norm, plain": (functional.layer_norm, lambda x, _: functional.layer_norm(x, (4,))),
    "layer_norm, two dimensions": (functional.layer_norm, lambda x, _: functional.layer_norm(x, (3, 4))),
    "module": (functional.layer_norm, torch.nn.LayerNorm(4).double().forward),
}


class Operations(TorchDispatchMode):
    """Counts what reaches the kernels."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def derivative(call, lean):
    x = forward_ad.make_dual(X, normal(2, 3, 4, seed=7))
    y = forward_ad.make_dual(normal(2, 3, 4, seed=8), normal(2, 3, 4, seed=9))
    arguments = (x,) if isinstance(getattr(call, "__self__", None), torch.nn.Module) else (x, y)
    if not lean:
        return forward_ad.unpack_dual(call(*arguments))
    with LeanForwardMode():
        return forward_ad.unpack_dual(call(*arguments))


@pytest.mark.parametrize("name", CALLS)
def test_a_formula_has_the_value_and_the_tangent_of_torch(name):
    with forward_ad.dual_level():
        for actual, expected in zip(
            derivative(CALLS[name][1], True), derivative(CALLS[name][1], False), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


def test_every_formula_has_a_call_and_is_what_answers_it(monkeypatch):
    assert {function for function, _ in CALLS.values()} == set(FORMULAS)
    for function, call in CALLS.values():
        places, _ = FORMULAS[function]
        answer = torch.ones(2), torch.full((2,), 7.0)
        monkeypatch.setitem(FORMULAS, function, (places, lambda *args, answer=answer, **named: answer))
        with forward_ad.dual_level():
            assert derivative(call, True).tangent.tolist() == [7.0, 7.0]


def test_tangents_elsewhere_are_left_to_torch():
    with forward_ad.dual_level(), LeanForwardMode():
        weight = forward_ad.make_dual(W, normal(5, 4, seed=5))
        x = forward_ad.make_dual(X, normal(2, 3, 4, seed=7))
        of_both = forward_ad.unpack_dual(functional.linear(x, weight)).tangent
        of_weight = forward_ad.unpack_dual(functional.linear(X, weight)).tangent
        of_bias = forward_ad.unpack_dual(functional.linear(x, W, bias=forward_ad.make_dual(B, B))).tangent
        product = forward_ad.unpack_dual(G * x).tangent
    x_dot, w_dot = normal(2, 3, 4, seed=7), normal(5, 4, seed=5)
    torch.testing.assert_close(of_weight, X @ w_dot.T)
    torch.testing.assert_close(of_both, x_dot @ W.T + X @ w_dot.T)
    torch.testing.assert_close(of_bias, x_dot @ W.T + B)
    torch.testing.assert_close(product, G * x_dot)


def test_autocast_acts_as_it_does_without_the_formulas():
    layer = torch.nn.LayerNorm(4)
    with forward_ad.dual_level(), torch.autocast("cpu", torch.bfloat16):
        x = forward_ad.make_dual(X.float(), torch.ones(2, 3, 4))
        plain = forward_ad.unpack_dual(layer(functional.linear(x, W.float())[..., :4]))
        with LeanForwardMode():
            lean = forward_ad.unpack_dual(layer(functional.linear(x, W.float())[..., :4]))
    assert plain.primal.dtype == lean.primal.dtype
    assert torch.equal(plain.primal, lean.primal) and torch.equal(plain.tangent, lean.tangent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_to_torch(dtype):
    layer = torch.nn.LayerNorm(4).to(dtype)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.to(dtype), torch.ones(2, 3, 4, dtype=dtype))
        plain = forward_ad.unpack_dual(layer(functional.linear(x, W.to(dtype))[..., :4]))
        with LeanForwardMode():
            lean = forward_ad.unpack_dual(layer(functional.linear(x, W.to(dtype))[..., :4]))
    assert torch.equal(plain.primal, lean.primal) and torch.equal(plain.tangent, lean.tangent)


def test_an_estimate_of_the_jacobian_multiplies_no_zeros():
    """Two blocks, a point behind each: values of 6 layers a block and the head, tangents behind the first."""
    network = {"method": "dfa", "dfa_granularity": "block", "dfa_norm": True, "fa_grape": True}
    model, (idx, _) = make_model(**network), make_batch()
    places = [place for place in model.feedback_places() if place.rule.aligns == "network"]
    with Operations() as operations:
        estimates = jvp_estimates(model, lambda: model.logits(idx), places, 1)
    values, tangents, products = 2 * 6 + 1, 6 + 1, len(estimates)
    assert operations.counts["mm"] == values + tangents + products

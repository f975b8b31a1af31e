"""Several layers of one input in one call: equal to the layers one by one, and only where they may be."""

import pytest
import torch
from cases import RULE_CASES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from localgpt_core import RULES, LocalLinear, RuleOptions
from localgpt_core.common.modes import exact_derivatives
from localgpt_core.layers.linear import publish_error
from localgpt_core.layers.shared_input import outputs_of

IN, SIZES, V, TOKENS = 6, (4, 5, 3), 7, (2, 8)
LOCAL = {name: options for name, options in RULE_CASES.items() if "dfa_granularity" not in options}


def layers_of(options, bias=True, dtype=torch.float64):
    torch.manual_seed(3)
    rule = RuleOptions(**options)
    layers = nn.ModuleList(LocalLinear(IN, n, bias, rule, error_features=V, dtype=dtype) for n in SIZES)
    for layer in layers:
        if bias:
            nn.init.normal_(layer.bias)
    return layers


def learned(layers, together, through=None):
    """Return the outputs, taps and gradients for one input; ``through`` wraps the call."""
    source = torch.Generator().manual_seed(5)
    x = torch.randn(*TOKENS, IN, generator=source, dtype=torch.float64, requires_grad=True)
    taps = []
    ys = (through or (lambda call: call()))(
        lambda: outputs_of(layers, x, taps) if together else [layer(x, taps) for layer in layers]
    )
    errors = [torch.randn(y.shape, generator=source, dtype=torch.float64) for y in ys]
    output = publish_error(
        torch.randn(*TOKENS, V, generator=source, dtype=torch.float64).requires_grad_(), taps
    )
    error = torch.randn(output.shape, generator=source, dtype=torch.float64)
    layers.zero_grad()
    torch.autograd.backward([*ys, output], [*errors, error])
    return [y.detach() for y in ys], [x.grad, *(p.grad for p in layers.parameters())], len(taps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LOCAL)
def test_one_call_gives_what_the_layers_give_one_by_one(name, bias):
    layers = layers_of(LOCAL[name], bias)
    ys, gradients, taps = learned(layers, together=True)
    alone, expected, _ = learned(layers, together=False)
    for actual, wanted in zip(ys + gradients, alone + expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)
    assert taps == (RULES[layers[0].rule.options.method].error == "output")


def test_the_gradients_are_those_of_the_equations():
    layers = layers_of({"method": "fa"})
    ys, (of_input, *of_parameters), _ = learned(layers, together=True)
    source = torch.Generator().manual_seed(5)
    x = torch.randn(*TOKENS, IN, generator=source, dtype=torch.float64).flatten(0, 1)
    errors = [torch.randn(*TOKENS, n, generator=source, dtype=torch.float64).flatten(0, 1) for n in SIZES]
    expected = sum(g @ layer.feedback_weight for g, layer in zip(errors, layers, strict=True))
    torch.testing.assert_close(of_input.flatten(0, 1), expected)
    for layer, g, y, weight, bias in zip(
        layers, errors, ys, of_parameters[::2], of_parameters[1::2], strict=True
    ):
        torch.testing.assert_close(y.flatten(0, 1), x @ layer.weight.T + layer.bias)
        torch.testing.assert_close(weight, g.T @ x)
        torch.testing.assert_close(bias, g.sum(dim=0))


def products(layers, options):
    x = torch.randn(*TOKENS, IN, dtype=torch.float64, requires_grad=True)
    taps = []
    with FlopCounterMode(display=False) as counter:
        ys = outputs_of(layers, x, taps)
        output = publish_error(torch.zeros(*TOKENS, V, dtype=torch.float64, requires_grad=True), taps)
        torch.autograd.backward([*ys, output], [torch.ones_like(y) for y in (*ys, output)])
    return counter.get_total_flops() / (2 * TOKENS[0] * TOKENS[1] * IN)


def test_there_is_one_product_forward_one_for_the_weights_and_one_for_the_input():
    assert products(layers_of({"method": "fa"}), "fa") == 3 * sum(SIZES)
    assert products(layers_of({"method": "bp"}), "bp") == 3 * sum(SIZES)
    assert products(layers_of({"method": "dfa"}), "dfa") == 2 * sum(SIZES) + V


def test_a_rule_without_transport_keeps_no_weight_and_does_not_depend_on_it():
    layers = layers_of({"method": "fa"})
    kept = []
    x = torch.randn(*TOKENS, IN, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ys = outputs_of(layers, x, [])
    weights = {layer.weight.data_ptr() for layer in layers}
    sizes = {layer.weight.shape for layer in layers} | {(sum(SIZES), IN)}
    feedback = {layer.feedback_weight.data_ptr() for layer in layers}
    assert not {t.data_ptr() for t in kept} & weights
    assert {t.data_ptr() for t in kept if t.shape in sizes} == feedback
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(1.0)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    expected = sum(layer.feedback_weight.sum(dim=0) for layer in layers)
    torch.testing.assert_close(x.grad, expected.expand_as(x))


def calls(layers, **change):
    """Return how many calls of a layer a joint call makes."""
    count = []
    for layer in layers:
        usual = layer.forward
        layer.forward = lambda *args, usual=usual: count.append(1) or usual(*args)
    outputs_of(layers, torch.randn(*TOKENS, IN, dtype=torch.float64, requires_grad=True), [])
    return len(count)


class Less(RULES["fa"]):
    def signal(self, error):
        return error.sign()


def test_layers_that_may_not_share_a_call_are_called_one_by_one():
    assert calls(layers_of({"method": "fa"})) == 0
    watched = layers_of({"method": "fa"})
    seen = []
    watched[1].register_forward_hook(lambda *args: seen.append(args))
    assert calls(watched) == 3 and len(seen) == 1
    watched = layers_of({"method": "fa"})
    watched[2].register_forward_pre_hook(lambda *args: None)
    assert calls(watched) == 3
    watched = layers_of({"method": "fa"})
    watched[0].register_full_backward_hook(lambda *args: None)
    assert calls(watched) == 3
    signs = layers_of({"method": "fa"})
    for layer in signs:
        layer.rule = Less(layer.rule.options)
    assert calls(signs) == 3
    mixed = layers_of({"method": "fa"})
    mixed[1] = layers_of({"method": "kp"})[1]
    assert calls(mixed) == 3
    plain = layers_of({"method": "bp"})
    with torch.no_grad():
        assert calls(plain) == 3


def test_the_exact_derivative_of_a_joint_call_is_that_of_backpropagation():
    layers, exact = layers_of({"method": "fa"}), layers_of({"method": "bp"})
    exact.load_state_dict(layers.state_dict(), strict=False)

    def exactly(call):
        with exact_derivatives(layers):
            return call()

    torch.testing.assert_close(learned(layers, True, exactly)[1], learned(exact, True)[1])


def test_a_joint_call_names_its_layers_where_no_error_arrives():
    layers = layers_of({"method": "dfa"})
    for place, layer in enumerate(layers):
        layer.place = place
    ys = outputs_of(layers, torch.randn(*TOKENS, IN, dtype=torch.float64, requires_grad=True), [])
    with pytest.raises(RuntimeError, match="layer '0, 1, 2': no error of the network's output"):
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])


def test_a_joint_call_under_autocast_has_its_types():
    layers = layers_of({"method": "fa"}, dtype=torch.float32)
    x = torch.randn(*TOKENS, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ys = outputs_of(layers, x, [])
    assert {y.dtype for y in ys} == {torch.bfloat16}
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert x.grad.dtype == layers[0].weight.grad.dtype == torch.float32

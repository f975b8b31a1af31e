"""What users do to modules beside training them: views, tracing, threads, copies, surgery on the output."""

import copy
import io
import threading

import pytest
import torch
from cases import normal
from reference import FEEDBACK
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from localgpt_core import LocalGPT, LocalGPTConfig, LocalLinear, RuleOptions, localize
from localgpt_core.convert import layers as convert_layers
from localgpt_core.layers.linear import LocalLayer

METHODS = list(FEEDBACK)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def mlp(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(3, 5, bias), nn.Tanh(), nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, 2, bias)
    return nn.Sequential(*layers).to(dtype)


def with_conv1d():
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(5, 3), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def converted(method, network=None):
    network = network or mlp()
    return network, localize(network, method=method, output=f"{len(network) - 1}", seed=1)


def gradients(network, y):
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(y, parameters), strict=True))


# ------------------------------------------------------------ bits, views, dtypes

INPUTS = {
    "whole": lambda: normal(4, 6, 3),
    "permuted": lambda: normal(6, 4, 3).transpose(0, 1),
    "columns": lambda: normal(4, 6, 7)[..., ::2][..., :3],
    "expanded": lambda: normal(1, 6, 3).expand(4, 6, 3),
    "channels last": lambda: normal(2, 3, 4, 5).permute(0, 2, 3, 1),
    "one": lambda: normal(3),
    "none": lambda: normal(0, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", INPUTS)
def test_the_forward_pass_stays_bit_for_bit_whatever_the_strides(name, bias, dtype):
    x = INPUTS[name]().to(dtype)
    expected = mlp(bias, dtype)(x)
    for method in METHODS:
        network, _ = converted(method, mlp(bias, dtype))
        y = network(x)
        assert torch.equal(y, expected), method
        y.sum().backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", INPUTS)
def test_strides_change_no_gradient(name, method):
    network, _ = converted(method)
    x = INPUTS[name]()
    actual = gradients(network, network(x).square().sum())
    expected = gradients(network, network(x.clone(memory_format=torch.contiguous_format)).square().sum())
    for key, want in expected.items():
        torch.testing.assert_close(actual[key], want, **CLOSE)


CHANGES = {
    "scaled": lambda y: y.div_(2),
    "masked": lambda y: y.masked_fill_(y > 0, 0.5),
    "a part": lambda y: y[..., 0].zero_(),
    "relu": torch.relu_,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (3,)], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_outputs_may_be_changed_in_place(name, shape, method):
    network, _ = converted(method)
    x = normal(*shape)
    whole, part = network(x), network[0](x)
    want = gradients(network, _changed(network(x).clone(), name))
    got = gradients(network, _changed(whole, name))
    for key in want:
        torch.testing.assert_close(got[key], want[key], **CLOSE)
    CHANGES[name](part)


def _changed(y, name):
    CHANGES[name](y)
    return y.square().sum()


@pytest.mark.parametrize("method", METHODS)
def test_the_logits_of_a_model_may_be_changed_in_place(method):
    sizes = {"block_size": 6, "vocab_size": 7, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.0}
    model = LocalGPT(LocalGPTConfig(**sizes, method=method)).double()
    idx = torch.arange(6)[None]
    found = []
    for change in (lambda y: y / 2, lambda y: y.div_(2)):
        model.zero_grad(set_to_none=True)
        change(model(idx)[0]).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_autocast_gives_the_dtype_that_torch_gives(dtype, method):
    plain, x = mlp(dtype=dtype), normal(4, 3).to(dtype)
    network, _ = converted(method, copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(x), network(x)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    actual.sum().backward()
    assert {p.grad.dtype for p in network.parameters()} == {dtype}


@pytest.mark.parametrize("method", METHODS)
def test_on_the_meta_device_shapes_go_through(method):
    with torch.device("meta"):
        network, _ = converted(method)
    y = network(torch.empty(4, 3, device="meta", dtype=torch.float64))
    y.sum().backward()
    assert y.shape == (4, 2) and all(p.grad.is_meta for p in network.parameters())


# ------------------------------------------------------------ torch.func, torch.jit


@pytest.mark.parametrize("method", METHODS)
def test_function_transforms_give_the_gradients_of_the_rule(method):
    network, _ = converted(method)
    x = normal(4, 3)
    values = dict(network.named_parameters())
    expected = gradients(network, network(x).square().sum())

    def loss(values, x):
        return torch.func.functional_call(network, values, (x,)).square().sum()

    for name, got in torch.func.grad(loss)(values, x).items():
        torch.testing.assert_close(got, expected[name], **CLOSE)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for name, got in each.items():
        assert got.shape == (4, *expected[name].shape)
        torch.testing.assert_close(got.sum(0), expected[name], **CLOSE)


def test_forward_mode_is_exact_or_refused():
    x, tangent = normal(4, 3), normal(4, 3, seed=9)
    expected = torch.func.jvp(mlp(), (x,), (tangent,))[1]
    for method in METHODS:
        network, _ = converted(method)
        with torch.no_grad():
            torch.testing.assert_close(torch.func.jvp(network, (x,), (tangent,))[1], expected)
        if method == "bp":
            torch.testing.assert_close(torch.func.jvp(network, (x,), (tangent,))[1], expected)
        else:
            with pytest.raises(ValueError, match=f"method='{method}': is about the backward pass"):
                torch.func.jvp(network, (x,), (tangent,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_trace_has_the_values_and_is_refused_in_training_mode(method):
    network, _ = converted(method)
    x = normal(4, 3)
    traced = torch.jit.trace(network.eval(), x)
    assert torch.equal(traced(normal(6, 3, seed=9)), network(normal(6, 3, seed=9)))
    with pytest.raises(ValueError, match="layer='0': cannot be traced or exported in training mode"):
        torch.jit.trace(network.train(), x)
    with pytest.raises(RuntimeError, match="layer '0' cannot be scripted: use torch.compile"):
        torch.jit.script(network)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_an_export_has_the_values_and_is_refused_in_training_mode(method):
    network, _ = converted(method)
    x = normal(4, 3)
    exported = torch.export.export(network.eval(), (x,)).module()
    assert torch.equal(exported(x), network(x))
    with pytest.raises(Exception, match="layer='0': cannot be traced or exported in training mode"):
        torch.export.export(network.train(), (x,))


# ------------------------------------------------------------ copies, files, threads


@pytest.mark.parametrize("method", METHODS)
def test_a_module_can_be_sent_in_the_middle_of_a_pass(method):
    network, _ = converted(method, with_conv1d())
    network[:4](normal(4, 3))
    stored = io.BytesIO()
    torch.save(network, stored)
    stored.seek(0)
    loaded, copied = torch.load(stored, weights_only=False), copy.deepcopy(network)
    x = normal(4, 3, seed=9)
    expected = gradients(network, network(x).square().sum())
    for twin in (loaded, copied):
        assert isinstance(twin[0], Conv1D) and isinstance(twin[0], LocalLayer)
        assert not isinstance(twin[0], nn.Linear)
        for name, got in gradients(twin, twin(x).square().sum()).items():
            torch.testing.assert_close(got, expected[name], **CLOSE)


def test_the_class_of_a_converted_conv1d_is_found_by_its_name():
    network, _ = converted("fa", with_conv1d())
    assert type(network[0]) is convert_layers.ConvertedConv1D
    with pytest.raises(AttributeError, match="ConvertedConv2D"):
        _ = convert_layers.ConvertedConv2D


def test_threads_do_not_take_each_others_taps():
    network, _ = converted("dfa")
    batches = [normal(4, 3, seed=seed) for seed in range(8)]
    expected = [gradients(network, network(x).square().sum()) for x in batches]
    found, meet = [None] * len(batches), threading.Barrier(len(batches))

    def work(i):
        h = network[:4](batches[i])
        meet.wait(30)
        found[i] = gradients(network, network[4](h).square().sum())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        for name in want:
            torch.testing.assert_close(got[name], want[name], **CLOSE)


# ------------------------------------------------------------ surgery on the output


def test_a_replaced_output_names_the_layer_that_lost_its_error():
    network, _ = converted("dfa")
    network[4] = nn.Linear(4, 4).double()
    with pytest.raises(RuntimeError, match="layer '2': no error of the network's output reached it"):
        network(normal(4, 3).requires_grad_(True)).sum().backward()


def test_a_resized_output_names_itself_and_both_widths():
    network, _ = converted("dfa")
    network[4].weight = nn.Parameter(torch.randn(4, 4).double())
    network[4].bias = nn.Parameter(torch.zeros(4).double())
    with pytest.raises(ValueError, match="width of the output '4'=4: was 2 when the module was localized"):
        network(normal(4, 3))


def test_an_output_that_is_fed_back_gets_the_errors_of_each_pass():
    """The second pass works on what the first has returned: two passes, not one output called twice."""
    network, localized = converted("dfa", nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    x, feedback = normal(4, 3), localized.layers["0"].buffer

    def slope(h):
        return 1 - h**2

    y1 = network(x)
    y2 = network(torch.sin(y1))
    y2.square().sum().backward()
    w = network[0].weight
    h1, h2 = (torch.tanh(functional.linear(v, w, network[0].bias)).detach() for v in (x, torch.sin(y1)))
    e2 = 2 * y2.detach()
    e1 = (e2 @ feedback) * torch.cos(y1.detach())
    want = ((e2 @ network[2].buffer) * slope(h2)).T @ torch.sin(y1.detach())
    want = want + ((e1 @ network[2].buffer) * slope(h1)).T @ x
    torch.testing.assert_close(w.grad, want, **CLOSE)


def test_a_layer_by_itself_says_which_one_it_is():
    layer = LocalLinear(3, 5, options=RuleOptions(method="dfa"), error_features=4)
    layer.place = "mlp.fc"
    with pytest.raises(RuntimeError, match="layer 'mlp.fc': no error of the network's output"):
        layer(torch.randn(2, 3, requires_grad=True), []).sum().backward()


# ------------------------------------------------------------ files of transformers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_saved_by_transformers_the_feedback_comes_back_from_the_file(tmp_path):
    """As the page "What localize can do" says: from_pretrained, localize, load the file once more."""
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 6, "n_positions": 8, "vocab_size": 5}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval()
    localized = localize(model, method="kp", seed=3)
    for layer in localized.layers.values():
        layer.buffer.add_(1.0)  # what training has made of it
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    again = localize(loaded, method="kp", seed=3)
    missing, unexpected = loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied, and written once
    for name, layer in localized.layers.items():
        assert torch.equal(again.layers[name].buffer, layer.buffer), name
        assert torch.equal(again.layers[name].weight, layer.weight)

"""LocalConv2d: a rule for linear layers, at every place of an image."""

import copy

import pytest
import torch
from cases import normal
from torch import nn
from torch.nn import functional

from localgpt_core import RULES, RuleOptions, localize, weight_transport
from localgpt_core.layers.convolution import LocalConv2d

LOCAL = [name for name, rule in RULES.items() if rule.error == "local"]
GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "padding": {"kernel_size": 3, "padding": (1, 2)},
    "stride": {"kernel_size": (2, 3), "stride": (2, 1), "padding": 1},
    "dilation": {"kernel_size": 2, "dilation": (1, 2), "stride": 2},
    "groups": {"kernel_size": 2, "groups": 2, "bias": False},
}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def layer(method, **geometry):
    torch.manual_seed(0)
    return LocalConv2d(4, 6, **geometry, options=RuleOptions(method=method)).double()


def feedback(place):
    matrix = None if place.rule.transports == "nothing" else place.matrix
    return place.rule.feedback(matrix, place.buffer)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("method", LOCAL)
def test_it_is_the_linear_rule_on_every_patch(name, method):
    """grad_input is the fold of error @ F over the patches, written without a convolution."""
    place, geometry = layer(method, **GEOMETRIES[name]), GEOMETRIES[name]
    x = normal(2, 4, 5, 6).requires_grad_(True)
    y = place(x)
    assert torch.equal(y, functional.conv2d(x, place.weight, place.bias, *place.geometry))
    error = normal(*y.shape, seed=9)
    y.backward(error)
    sizes = {
        key: geometry.get(key, default) for key, default in (("dilation", 1), ("padding", 0), ("stride", 1))
    }
    patches = functional.unfold(x.detach(), geometry["kernel_size"], **sizes)
    rows, groups = error.flatten(2), place.groups
    pieces = zip(rows.chunk(groups, 1), feedback(place).detach().chunk(groups), strict=True)
    down = torch.cat([f.T @ e for e, f in pieces], dim=1)
    want = functional.fold(down, (5, 6), geometry["kernel_size"], **sizes)
    torch.testing.assert_close(x.grad, want, **CLOSE)
    pieces = zip(rows.chunk(groups, 1), patches.chunk(groups, 1), strict=True)
    grad = torch.cat([(e @ p.mT).sum(0) for e, p in pieces]).view_as(place.weight)
    torch.testing.assert_close(place.weight.grad, grad, **CLOSE)
    if place.bias is not None:
        torch.testing.assert_close(place.bias.grad, error.sum(dim=(0, 2, 3)), **CLOSE)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("method", [m for m in LOCAL if m not in ("bp", "sign_sym")])
def test_with_the_weight_as_its_feedback_it_is_backpropagation(name, method):
    place = layer(method, **GEOMETRIES[name])
    place.buffer.copy_(place.matrix.detach())
    plain = nn.Conv2d(4, 6, **GEOMETRIES[name]).double()
    plain.load_state_dict(place.state_dict(), strict=False)
    inputs = [normal(2, 4, 5, 6).requires_grad_(True) for _ in range(2)]
    for module, x in zip((place, plain), inputs, strict=True):
        module(x).sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **CLOSE)
    torch.testing.assert_close(place.weight.grad, plain.weight.grad, **CLOSE)


@pytest.mark.parametrize("method", LOCAL)
def test_a_single_image_is_a_batch_of_one(method):
    place = layer(method, kernel_size=3)
    x = normal(4, 5, 6).requires_grad_(True)
    place(x).square().sum().backward()
    alone = x.grad.clone()
    x.grad = None
    place(x[None]).square().sum().backward()
    torch.testing.assert_close(x.grad, alone, **CLOSE)


@pytest.mark.parametrize("method", LOCAL)
def test_only_a_declared_weight_is_kept(method):
    place, kept = layer(method, kernel_size=3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        place(normal(2, 4, 5, 6).requires_grad_(True))
    assert (place.weight.data_ptr() in kept) == (place.rule.transports != "nothing")


def test_an_output_error_and_a_padding_that_is_none_of_zeros_are_refused():
    with pytest.raises(ValueError, match="method='dfa': uses the output's error, which has no place"):
        LocalConv2d(1, 2, 3, options=RuleOptions(method="dfa"))
    for more in ({"padding": "same"}, {"padding": 1, "padding_mode": "circular"}):
        with pytest.raises(ValueError, match="padding=.*: its padding is none of zeros and numbers"):
            LocalConv2d(1, 2, 3, **more)


@pytest.mark.parametrize("method", ["fa", "kp", "wm"])
def test_a_small_network_of_convolutions_learns(method):
    """Whether the upper or the lower half of an image is bright: convolutions below a linear head."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(54, 2),
    )
    x = torch.randn(256, 1, 8, 8)
    y = (x[:, 0, :4].square().mean((1, 2)) > x[:, 0, 4:].square().mean((1, 2))).long()
    frozen = copy.deepcopy(network)
    losses = {}
    for name, module in {"rule": network, "frozen": frozen}.items():
        if name == "frozen":
            module[:4].requires_grad_(False)
        localized = localize(module, method=method, **({"fa_grape": True} if method == "fa" else {}))
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
        localized.attach(optimizer)
        for _ in range(150):
            optimizer.zero_grad()
            loss = functional.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["rule"] < 0.7 * losses["frozen"]
    reads = weight_transport(network, loss=lambda: functional.cross_entropy(network(x[:8]), y[:8]))
    assert set(reads.values()) <= {"nothing", "silent"} and reads["2"] == "nothing"

"""Direct Kolen-Pollack: its gradient by hand, its limit, which is Kolen-Pollack, and what it needs."""

import copy

import pytest
import torch
from cases import SIZES, T, make_batch, make_layer, make_model, normal
from torch import nn
from torch.nn import functional

from localgpt_core import LocalGPT, LocalGPTConfig, RuleOptions, TrainConfig, localize
from localgpt_core.layers.feedback_points import FeedbackPoint
from localgpt_core.layers.linear import publish_error
from localgpt_core.measure.alignment import feedback_cosines
from localgpt_core.training.step import (
    build_model,
    build_optimizer,
    learning_rate,
    trained_names,
    training_step,
)

TRAIN = TrainConfig(seed=4, steps=12, batch_size=2, warmup=3, lr=1e-2, weight_decay=0.5, precision="float64")
POINTS = {"method": "dkp", "dfa_granularity": "block", "dfa_norm": True}

X = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
ERROR = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
B = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 5.0]], dtype=torch.float64)


def published(taps: list[torch.Tensor]) -> torch.Tensor:
    return publish_error(torch.zeros(2, 2, dtype=torch.float64, requires_grad=True), taps)


# ------------------------------------------------------------ by hand


def test_the_gradient_of_the_feedback_by_hand():
    layer, taps, x = make_layer(3, 4, error_features=2, method="dkp"), [], X.clone().requires_grad_(True)
    layer.feedback_weight.data.copy_(B)
    y = layer(x, taps)
    torch.autograd.backward([y, published(taps)], [torch.full_like(y, 9.0), ERROR])
    # e^T x and e B with pencil and paper; the error that arrives at y trains the weight and is not handed on.
    assert layer.feedback_weight.grad.tolist() == [[1.0, 2.5, 0.5], [-2.0, -4.0, 2.0]]
    assert x.grad.tolist() == [[4.0, -2.0, -9.0], [1.0, 0.0, 0.5]]
    torch.testing.assert_close(layer.weight.grad, torch.full_like(y, 9.0).T @ X)


@pytest.mark.parametrize("norm", [False, True])
def test_a_feedback_point_by_hand(norm):
    point = FeedbackPoint(3, 2, RuleOptions(method="dkp"), norm).double()
    taps, x = [], X.clone().requires_grad_(True)
    y = point(x, taps)
    torch.autograd.backward([y, published(taps)], [torch.full_like(y, 9.0), ERROR])
    entered = functional.layer_norm(X, (3,)) if norm else X
    torch.testing.assert_close(point.feedback_weight.grad, ERROR.T @ entered, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"method": "dkp"}, POINTS], ids=["layers", "points"])
def test_the_gradient_of_every_feedback_matrix_is_that_of_a_weight_to_the_output(options):
    """W' = 0 from each input to the logits changes nothing, and has the gradient e^T x by autograd."""
    model, plain = make_model(**options), make_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    idx, targets = make_batch()
    model(idx, targets)[1].backward()
    inputs, hooks = {}, []
    for name, place in plain.named_modules():
        if isinstance(place, nn.Linear):
            note = lambda module, args, name=name: inputs.__setitem__(name, args[0].detach())  # noqa: E731
            hooks.append(place.register_forward_pre_hook(note))
    for i, block in enumerate(plain.blocks):
        note = lambda module, args, out, i=i: inputs.__setitem__(f"blocks.{i}.feedback", out.detach())  # noqa: E731
        hooks.append(block.register_forward_hook(note))
    logits = plain.logits(idx)
    extra = {}
    for name, place in model.named_modules():
        if getattr(place, "learns", False):
            x = functional.layer_norm(inputs[name], (12,)) if name.endswith("feedback") else inputs[name]
            extra[name] = torch.zeros(7, x.shape[-1], dtype=torch.float64, requires_grad=True)
            logits = logits + x @ extra[name].T
    assert len(extra) == (12 if options == {"method": "dkp"} else 2)
    functional.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
    for name, weight in extra.items():
        found = model.get_submodule(name).feedback_weight.grad
        torch.testing.assert_close(found, weight.grad, rtol=1e-10, atol=1e-14)


# ------------------------------------------------------------ the limit: Kolen-Pollack


@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
@pytest.mark.parametrize("options", [{"method": "dkp"}, POINTS], ids=["layers", "points"])
def test_at_the_head_it_is_kolen_pollack(options, grad_clip):
    config = TrainConfig(**{**TRAIN.__dict__, "grad_clip": grad_clip})
    model = build_model(LocalGPTConfig(**SIZES, **options), config)
    optimizer, head = build_optimizer(model, config), model.head
    for step in range(config.steps):
        before = (head.weight - head.feedback_weight).detach()
        training_step(model, optimizer, config, *make_batch(), step)
        factor = 1 - learning_rate(step, config) * config.weight_decay
        after = head.weight - head.feedback_weight
        torch.testing.assert_close(after, factor * before, rtol=1e-11, atol=1e-15)


def test_a_network_of_two_layers_takes_the_steps_of_kolen_pollack():
    """The hidden layer learns through the head's feedback alone, and that is the same matrix under both."""
    weights = {}
    for method in ("kp", "dkp", "dfa"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)).double()
        localized = localize(network, method=method, output="1", seed=3)
        network[1].feedback_weight.data.copy_(normal(4, 5, seed=2))
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.5)
        localized.attach(optimizer)
        for step in range(30):
            optimizer.zero_grad()
            x = normal(6, 3, seed=step)
            (network(x) - x @ normal(3, 4, seed=1)).square().mean().backward()
            optimizer.step()
        weights[method] = [p.detach().clone() for p in network.parameters()]
    for found, expected in zip(weights["dkp"], weights["kp"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(weights["dfa"][0], weights["kp"][0], atol=1e-3)


def test_a_point_in_front_of_a_linear_head_follows_its_weight():
    """Without a norm in between, e^T x at the point is the gradient of the head's weight."""
    torch.manual_seed(0)
    point, head = FeedbackPoint(3, 4, RuleOptions(method="dkp")).double(), nn.Linear(3, 4, False).double()
    optimizer = torch.optim.AdamW([head.weight, point.buffer], lr=0.05, weight_decay=0.5)
    start = (head.weight - point.buffer).detach()
    for step in range(40):
        taps, x = [], normal(6, 3, seed=step).requires_grad_(True)
        optimizer.zero_grad()
        logits = publish_error(head(point(x, taps)), taps)
        (logits - x.detach() @ normal(3, 4, seed=1)).square().sum().backward()
        torch.testing.assert_close(point.buffer.grad, head.weight.grad, rtol=1e-12, atol=1e-14)
        optimizer.step()
    torch.testing.assert_close(head.weight - point.buffer, 0.975**40 * start, rtol=1e-10, atol=1e-14)


# ------------------------------------------------------------ training


def test_the_optimiser_holds_the_feedback_of_every_place_and_decays_it():
    for options in ({"method": "dkp"}, POINTS):
        model = build_model(LocalGPTConfig(**SIZES, **options), TRAIN)
        buffers = {n for n, _ in model.named_buffers() if n.endswith("feedback_weight")}
        assert buffers <= {*trained_names(model)}
        groups = build_optimizer(model, TRAIN).param_groups
        assert {id(b) for n, b in model.named_buffers() if n in buffers} <= {
            id(p) for p in groups[0]["params"]
        }


def test_clipping_is_by_the_parameters_alone_and_scales_the_feedback_alike():
    idx, targets = make_batch()
    found = {}
    for clip in (0.0, 0.01):
        config = TrainConfig(**{**TRAIN.__dict__, "grad_clip": clip})
        model = build_model(LocalGPTConfig(**SIZES, **POINTS), config)
        training_step(model, build_optimizer(model, config), config, idx, targets, 0)
        named = (*model.named_parameters(), *model.named_buffers())
        found[clip] = {name: tensor.grad for name, tensor in named if tensor.grad is not None}
    norm = torch.stack([found[0.0][n].norm() for n, _ in model.named_parameters()]).norm()
    assert norm > 0.01 and "blocks.0.feedback.feedback_weight" in found[0.0]
    for name, gradient in found[0.0].items():
        torch.testing.assert_close(
            found[0.01][name], gradient * (0.01 / (norm + 1e-6)), rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("options", [{"method": "dkp"}, POINTS], ids=["layers", "points"])
def test_at_an_anchor_the_feedback_has_no_gradient_but_the_heads(options):
    config = TrainConfig(**{**TRAIN.__dict__, "anchor_interval": 1})
    model = build_model(LocalGPTConfig(**SIZES, **options), config)
    optimizer, before = build_optimizer(model, config), copy.deepcopy(model.state_dict())
    training_step(model, optimizer, config, *make_batch(), 0)
    factor = 1 - learning_rate(0, config) * config.weight_decay
    for name, buffer in model.named_buffers():
        if name == "head.feedback_weight":
            assert torch.equal(buffer.grad, model.head.weight.grad)
        elif name.endswith("feedback_weight"):
            assert not buffer.grad.any()
            torch.testing.assert_close(buffer, factor * before[name], rtol=1e-12, atol=0)


def test_behind_a_norm_the_feedback_finds_the_jacobian():
    config = TrainConfig(seed=4, steps=150, batch_size=16, warmup=5, lr=1e-2, precision="float64")
    model = build_model(LocalGPTConfig(**SIZES, **POINTS), config)
    optimizer = build_optimizer(model, config)
    for step in range(config.steps):
        idx, _ = make_batch(rows=16, seed=step)
        targets = torch.where(torch.arange(T) > 0, idx.roll(1, dims=1), idx)
        training_step(model, optimizer, config, idx, targets, step)
    cosines = feedback_cosines(model, idx)
    assert cosines["blocks.1.feedback"] > 0.9 and cosines["blocks.0.feedback"] > 0.6


def test_a_stream_that_nothing_normalises_grows_and_the_blocks_learn_nothing():
    config, losses = TrainConfig(seed=4, steps=150, batch_size=16, warmup=5, lr=3e-2), {}
    for norm in (False, True):
        model = build_model(LocalGPTConfig(**SIZES, **POINTS | {"dfa_norm": norm}), config)
        optimizer = build_optimizer(model, config)
        for step in range(config.steps):
            idx, _ = make_batch(rows=16, seed=step)
            targets = torch.where(torch.arange(T) > 0, idx.roll(1, dims=1), idx)
            losses[norm] = training_step(model, optimizer, config, idx, targets, step).item()
    assert losses[True] < 0.1 and losses[False] > 1.2


# ------------------------------------------------------------ the tensor that learns


def test_the_feedback_learns_whatever_is_done_to_its_module():
    config = LocalGPTConfig(**SIZES, **POINTS)
    with torch.device("meta"):
        model = LocalGPT(config)
    torch.manual_seed(1)
    model.load_state_dict(LocalGPT(config).state_dict(), assign=True)
    for changed in (model, copy.deepcopy(model), model.double(), model.bfloat16().float()):
        changed.zero_grad()
        changed(*make_batch())[1].backward()
        for block in changed.blocks:
            buffer = block.feedback.feedback_weight
            assert buffer.is_leaf and buffer.grad.dtype == buffer.dtype and buffer.grad.any()
        assert changed.head.feedback_weight.grad is None and not changed.head.feedback_weight.requires_grad
        buffer.grad = None


def test_a_converted_module_warns_where_no_optimiser_holds_the_feedback():
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 4))
    localized = localize(network, method="dkp", output="2")
    assert len({id(p) for p in localized.parameters()}) == 6 + 3
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.ones(2, 3)).square().sum().backward()
    localized.mirror_gradients()
    optimizer.step()
    with pytest.warns(
        UserWarning, match="layer '0', '1', '2': the weight took a step and its feedback did not"
    ):
        localized.mirror_gradients()

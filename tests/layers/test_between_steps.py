"""Kolen-Pollack in the hands of optimisers, scalers and moves: the feedback takes the steps of its weight."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from localgpt_core import LocalGPT, LocalGPTConfig, localize
from localgpt_core.layers.between_steps import feedback_places, mirror

SIZES = {"block_size": 6, "vocab_size": 7, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.0}


def network(kind="linear"):
    torch.manual_seed(0)
    first = nn.Linear(4, 5) if kind == "linear" else Conv1D(5, 4)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))


def converted(kind="linear", **more):
    return localize(network(kind), method="kp", seed=3, **more)


def data(dtype=torch.float32):
    source = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, generator=source).to(dtype), torch.randn(7, 3, generator=source).to(dtype)


def apart(localized):
    """Return what Kolen-Pollack keeps without decay: the differences of weights and feedback."""
    return [(place.matrix - place.buffer).detach().clone() for place in localized.layers.values()]


def train(localized, optimizer, steps=3, scaler=None, dtype=torch.float32):
    x, y = data(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (localized.module(x) - y).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        localized.mirror_gradients()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


class WritesIntoGradients(torch.optim.SGD):
    """An optimiser that changes the gradients it was given, as many do to save memory."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)
        return super().step(closure)


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, fused=True),
    "writes": lambda p: WritesIntoGradients(p, lr=0.1),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_feedback_takes_the_steps_of_its_weight(name, kind, scaled):
    localized = converted(kind)
    start = apart(localized)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    weight = localized.layers["0"].weight.detach().clone()
    train(localized, OPTIMISERS[name](localized.parameters()), scaler=scaler)
    assert not torch.allclose(localized.layers["0"].weight, weight, atol=1e-3)
    for now, then in zip(apart(localized), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_scaler_changes_nothing(name):
    plain, scaled = converted(), converted()
    train(plain, OPTIMISERS[name](plain.parameters()))
    train(
        scaled, OPTIMISERS[name](scaled.parameters()), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)
    )
    for a, b in zip(plain.module.state_dict().values(), scaled.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_that_the_scaler_leaves_out_moves_neither_and_warns_of_nothing():
    localized = converted()
    optimizer = OPTIMISERS["sgd"](localized.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(localized.module.state_dict())
    scaler.scale(localized.module(data()[0]).square().mean()).backward()
    localized.layers["0"].weight.grad[0, 0] = torch.inf
    localized.mirror_gradients()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(t, before[name]) for name, t in localized.module.state_dict().items())
    train(localized, optimizer, steps=4)


# ------------------------------------------------------------ the same tensor

MOVES = {
    "double": lambda module: module.double(),
    "half and back": lambda module: module.half().float(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to("cpu", torch.float64),
    "load": lambda module: module.load_state_dict(copy.deepcopy(module.state_dict())),
    "reset": lambda module: module[2].reset_feedback(9),
    "twice": lambda module: module.double().float(),
}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", MOVES)
def test_the_feedback_stays_the_tensor_that_the_optimiser_holds(name, kind):
    localized = converted(kind)
    optimizer = OPTIMISERS["sgd"](localized.parameters())
    train(localized, optimizer, steps=1)
    held, value = localized.layers["2"].buffer, localized.layers["2"].buffer.clone()
    MOVES[name](localized.module)
    buffer = localized.layers["2"].buffer
    assert buffer is held and buffer.is_contiguous() and buffer.dtype == localized.layers["2"].weight.dtype
    assert torch.equal(buffer, value.to(buffer.dtype)) == (name != "reset") or name == "half and back"
    start, dtype = apart(localized), buffer.dtype
    train(localized, optimizer, dtype=dtype)
    precise = 0.05 if dtype == torch.bfloat16 else 1e-6
    for now, then in zip(apart(localized), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=precise)


def test_a_move_between_backward_and_step_takes_the_gradient_along():
    localized = converted()
    optimizer = OPTIMISERS["sgd"](localized.parameters())
    x, y = data()
    (localized.module(x) - y).square().mean().backward()
    localized.mirror_gradients()
    localized.module.double()
    start = apart(localized)
    optimizer.step()
    for now, then in zip(apart(localized), start, strict=True):
        torch.testing.assert_close(now, then)


def test_a_model_keeps_its_feedback_through_a_move():
    model = LocalGPT(LocalGPTConfig(**SIZES, method="kp"))
    held = [feedback for _, feedback in model.mirrored()]
    model.double()
    assert all(a is b for a, (_, b) in zip(held, model.mirrored(), strict=True))
    assert held[0].dtype == torch.float64


# ------------------------------------------------------------ the lost mirror

LOST = "the weight took a step and its feedback did not"


def test_feedback_that_no_optimiser_holds_is_told_once():
    localized = converted()
    with pytest.warns(UserWarning, match=rf"layer '0', '2': {LOST}.*Localized.parameters") as caught:
        train(localized, OPTIMISERS["sgd"](localized.module.parameters()), steps=5)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_model_tells_it_too():
    model = LocalGPT(LocalGPTConfig(**SIZES, method="kp"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    idx = torch.arange(6)[None] % 7
    with pytest.warns(UserWarning, match=f"layer 0, 1, 2, 3, 4, 5, 6: {LOST}"):
        for _ in range(2):
            optimizer.zero_grad()
            model(idx, idx)[1].backward()
            mirror(feedback_places(model))
            optimizer.step()


def test_the_feedback_gets_a_copy_of_the_gradient_unless_it_is_lent():
    model = LocalGPT(LocalGPTConfig(**SIZES, method="kp"))
    idx = torch.arange(6)[None] % 7
    model(idx, idx)[1].backward()
    for own in (True, False):
        mirror(feedback_places(model), copy=own)
        for weight, feedback in model.mirrored():
            assert torch.equal(weight.grad, feedback.grad)
            assert (weight.grad.data_ptr() != feedback.grad.data_ptr()) == own


def test_a_replaced_feedback_is_told_and_one_layer_of_two_by_its_name():
    localized = converted()
    optimizer = OPTIMISERS["sgd"](localized.parameters())
    train(localized, optimizer)
    layer = localized.layers["2"]
    layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()}, assign=True)
    optimizer.add_param_group({"params": [layer.weight, layer.bias]})
    with pytest.warns(UserWarning, match=rf"layer '2': {LOST}"):
        train(localized, optimizer)


def test_the_alignment_does_not_hide_a_lost_mirror():
    localized = converted(fa_grape=True)
    optimizer = OPTIMISERS["sgd"](localized.module.parameters())
    x, y = data()
    with pytest.warns(UserWarning, match=LOST):
        for step in range(2):
            localized.align_feedback(step)
            optimizer.zero_grad()
            (localized.module(x) - y).square().mean().backward()
            localized.mirror_gradients()
            optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("more", [{}, {"fa_grape": True}], ids=["kp", "kp-grape"])
def test_a_right_loop_warns_of_nothing(name, more):
    """Also where the rate starts at 0, gradients are gathered over passes, or a weight is frozen."""
    localized = converted(**more)
    optimizer = OPTIMISERS[name](localized.parameters())
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            localized.align_feedback(step)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * step
            optimizer.zero_grad()
            for _ in range(2):
                (localized.module(x) - y).square().mean().backward()
            localized.mirror_gradients()
            optimizer.step()


def test_a_parametrised_weight_has_no_mirror_and_the_layer_is_named():
    localized = converted()
    nn.utils.parametrizations.weight_norm(localized.module[2])
    localized.module(data()[0]).sum().backward()
    with pytest.raises(ValueError, match="layer='2': its weight is computed from other parameters"):
        localized.mirror_gradients()


def test_a_copy_and_a_file_are_watched_like_the_original():
    localized = converted()
    train(localized, OPTIMISERS["sgd"](localized.parameters()))
    twin = copy.deepcopy(localized)
    stored = io.BytesIO()
    torch.save(localized.module, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    with pytest.warns(UserWarning, match=LOST):
        train(twin, OPTIMISERS["sgd"](twin.module.parameters()))
    start = apart(localized)
    train(localized, OPTIMISERS["sgd"](localized.parameters()))
    for now, then in zip(apart(localized), start, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded[2].weight - loaded[2].buffer, start[1], rtol=0, atol=1e-6)

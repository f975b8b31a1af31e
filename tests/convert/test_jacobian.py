"""Feedback of foreign modules that follows the network's Jacobian: its estimate, what stays, refusals."""

import copy

import pytest
import torch
from cases import normal, off_start
from torch import nn
from torch.nn import functional

from localgpt_core import alignment, localize
from localgpt_core.common.modes import exact_derivatives

ESTIMATE = {"method": "dfa", "output": "head", "fa_grape": True, "jvp_update": "fdfa", "jvp_rate": 1.0}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
B, T = 2, 4


class Pooled(nn.Module):
    """x (B, T, 3) -> h (B, T, 5), tokens mixed -> (B, T, 6), their mean -> logits (B, 2)."""

    def __init__(self, curved=True):
        super().__init__()
        torch.manual_seed(6)
        self.up, self.mid, self.head = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)
        self.mix = nn.Parameter(torch.randn(T, T))
        self.curve = torch.tanh if curved else lambda h: h
        off_start(self.double())

    def first(self, x):
        return self.mix @ self.curve(self.up(x))

    def second(self, h):
        return self.curve(self.mid(h)).mean(dim=-2)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def true_jacobians(plain, x):
    """Return the mean over samples and their tokens of d logits / d token, (V, in), by layer."""
    behind = {
        "up": plain,
        "mid": lambda h: plain.head(plain.second(h)),
        "head": plain.head,
    }
    inputs = {"up": x, "mid": plain.first(x), "head": plain.second(plain.first(x))}
    each = {
        name: torch.stack([torch.func.jacrev(behind[name])(sample) for sample in samples.detach()])
        for name, samples in inputs.items()
    }
    return {name: (j.mean(dim=0) if j.ndim == 3 else j.mean(dim=(0, 2))).detach() for name, j in each.items()}


def by_unit_vectors(localized, x, name, calls, entries, monkeypatch):
    """Return the sum of the estimates of a layer with one entry of one of its probes 1, all others 0."""
    total, state = 0.0, {}

    def probe(shape, *, generator, device, dtype):
        p = torch.zeros(shape, dtype=dtype)
        if state["left"] == 0:
            p.view(-1)[state["entry"]] = 1.0
        state["left"] -= 1
        return p

    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", probe)
        for call in calls:
            for entry in range(entries):
                state.update(left=call, entry=entry)
                localized.align_feedback(0, forward=lambda: localized.module(x))
                total = total + localized.layers[name].buffer
    return total


SIZES = {"up": B * T * 3, "mid": B * T * 5, "head": B * 6}


def test_by_all_unit_vectors_the_estimate_is_the_mean_jacobian_exactly(monkeypatch):
    x = normal(B, T, 3)
    localized = localize(Pooled(), **ESTIMATE)
    for call, (name, expected) in enumerate(true_jacobians(Pooled(), x).items()):
        found = by_unit_vectors(localized, x, name, [call], SIZES[name], monkeypatch)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_where_the_jacobian_is_everywhere_the_same_it_is_backpropagation(monkeypatch):
    """A linear network that weighs its tokens alike: one matrix is right for all, each with all of e."""
    x, targets = normal(B, T, 3), normal(B, 2, seed=9)
    plain = Pooled(curved=False)
    with torch.no_grad():
        plain.mix.copy_(torch.eye(T) + 0.5)
    module = copy.deepcopy(plain)
    localized = localize(module, **ESTIMATE)
    found = {
        name: by_unit_vectors(localized, x, name, [call], SIZES[name], monkeypatch)
        for call, name in enumerate(SIZES)
    }
    for name, feedback in found.items():
        localized.layers[name].buffer.copy_(feedback)
    for network in (plain, module):
        (network(x) - targets).square().sum().backward()
    for name in ("up.weight", "up.bias", "mid.weight", "head.weight", "mix"):
        torch.testing.assert_close(
            module.get_parameter(name).grad, plain.get_parameter(name).grad, **CLOSE, msg=name
        )


def test_gaussian_probes_give_the_mean_jacobian_on_average():
    x = normal(B, T, 3)
    expected = true_jacobians(Pooled(), x)
    module = Pooled()
    localized, errors = localize(module, **ESTIMATE), []
    for repeats in (1000, 16000):
        localized.align_feedback(3, forward=lambda n=repeats: module(x.repeat(n, 1, 1)))
        errors.append(
            {name: (localized.layers[name].buffer - j).norm() / j.norm() for name, j in expected.items()}
        )
    for name in expected:
        few, many = (found[name] for found in errors)
        assert many < 0.25 and 2 < few / many < 8, (name, few, many)  # 16 times the draws


class Twice(nn.Module):
    """One layer at two depths; tokens are not pooled."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        off_start(self.double())

    def forward(self, x):
        return self.head(torch.sin(self.a(torch.tanh(self.a(x)))))


def test_all_calls_of_a_layer_count_alike(monkeypatch):
    x, plain = normal(B, T, 3), Twice()
    localized = localize(Twice(), **ESTIMATE)
    found = by_unit_vectors(localized, x, "a", [0, 1], x.numel(), monkeypatch)
    rows = x.view(-1, 3)
    first = [torch.func.jacrev(plain)(token) for token in rows]
    second = [
        torch.func.jacrev(lambda h: plain.head(torch.sin(plain.a(h))))(token)
        for token in torch.tanh(plain.a(rows)).detach()
    ]
    torch.testing.assert_close(found, torch.stack(first + second).mean(dim=0).detach(), **CLOSE)


def test_draws_depend_on_the_key_and_the_update_is_the_rules():
    x = normal(B, T, 3)

    def moved(*key, **more):
        localized = localize(Pooled(), **ESTIMATE | more, seed=1)
        localized.align_feedback(*key, forward=lambda: localized.module(x))
        return localized.layers["mid"].buffer

    estimate, start = moved(1), localize(Pooled(), method="dfa", output="head", seed=1).layers["mid"].buffer
    assert torch.equal(moved(1), estimate) and not torch.allclose(moved(2), estimate)
    torch.testing.assert_close(moved(1, jvp_rate=0.25), 0.75 * start + 0.25 * estimate, **CLOSE)
    turned = moved(1, jvp_update="grape", jvp_rate=0.25)
    torch.testing.assert_close(turned.norm(dim=0), start.norm(dim=0), **CLOSE)
    before, after = (functional.cosine_similarity(b, estimate, dim=0) for b in (start, turned))
    assert (after > before).all()


def test_the_outputs_own_feedback_may_stay():
    localized = localize(Pooled(), **ESTIMATE, fa_grape_head=False)
    before = {name: layer.buffer.clone() for name, layer in localized.layers.items()}
    localized.align_feedback(0, forward=lambda: localized.module(normal(B, T, 3)))
    moved = [name for name, layer in localized.layers.items() if not torch.equal(layer.buffer, before[name])]
    assert moved == ["up", "mid"]


# ------------------------------------------------------------ what stays


class Restless(nn.Module):
    """Everything that a pass could leave behind: running statistics, dropout, a loss, named inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.drop = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.head = nn.Linear(5, 2)
        off_start(self.double())

    def forward(self, *, x, targets=None):
        y = self.head(self.drop(torch.relu_(self.norm(self.up(x)))))
        return {"y": y} if targets is None else {"y": y, "loss": (y - targets).square().mean()}


def test_the_pass_leaves_nothing_behind():
    module, x, targets = Restless(), normal(6, 3), normal(6, 2, seed=9)
    localized = localize(module, **ESTIMATE)
    module.norm.eval()
    module(x=x, targets=targets)["loss"].backward()
    feedback = {f"{name}.feedback_weight" for name in localized.layers}
    state = {n: t.clone() for n, t in module.state_dict().items() if n not in feedback}
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    modes = [m.training for m in module.modules()]
    random, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    mkldnn = torch.backends.mkldnn.enabled
    localized.align_feedback(0, forward=lambda: functional.dropout(module(x=x)["y"]))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in module.named_parameters())
    assert [m.training for m in module.modules()] == modes and not module.norm.training
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.backends.mkldnn.enabled == mkldnn
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not localized.layers["up"].taps.waiting


def test_what_the_closure_returns_is_not_used():
    x, targets, found = normal(6, 3), normal(6, 2, seed=9), []
    for more in ({}, {"targets": targets}):
        module = Restless()
        localized = localize(module, **ESTIMATE)
        localized.align_feedback(0, forward=lambda more=more, module=module: module(x=x, **more))
        found.append(localized.layers["up"].buffer)
    assert torch.equal(*found)
    measured = alignment(module, loss=lambda: module(x=x, targets=targets)["loss"])
    assert measured.descends


def test_inside_exact_derivatives_it_moves_the_same():
    x, found = normal(B, T, 3), []
    for exact in (False, True):
        module = Pooled()
        localized = localize(module, **ESTIMATE)
        if exact:
            with exact_derivatives(module):
                localized.align_feedback(0, forward=lambda module=module: module(x))
                assert localized.layers["up"].exact
        else:
            localized.align_feedback(0, forward=lambda module=module: module(x))
        assert not localized.layers["up"].exact
        found.append(localized.layers["up"].buffer)
    assert torch.equal(*found)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mix = nn.Linear(3, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        h = self.up(x)
        return self.head(self.mix(h, h, h, need_weights=False)[0].mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.body, self.head = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(self.up(x))[0])


@pytest.mark.parametrize("kind", [Attending, Recurrent])
def test_fused_kernels_are_taken_apart(kind, monkeypatch):
    x, draw, found = normal(B, T, 3), torch.randn, []

    def alike(shape, *, generator, device, dtype):
        return draw(shape, generator=generator, dtype=torch.float64).to(dtype)

    monkeypatch.setattr(torch, "randn", alike)
    for dtype in (torch.float64, torch.float32):
        module = kind().to(dtype)
        localized = localize(module, **ESTIMATE)
        localized.align_feedback(0, forward=lambda module=module, dtype=dtype: module(x.to(dtype)))
        found.append([layer.buffer for layer in localized.layers.values()])
    for double, single in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ refusals


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Odd(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


def with_an_odd_part(operation):
    torch.manual_seed(0)
    parts = {"up": nn.Linear(3, 5), "odd": Odd(operation), "head": nn.Linear(5, 2)}
    module = nn.Sequential()
    for name, part in parts.items():
        module.add_module(name, part)
    return module.double()


@pytest.mark.parametrize(
    ("operation", "reason"),
    [(Backward.apply, "jvp"), (lambda x: torch.cdist(x, x)[:, :5], "forward AD with _cdist_forward")],
    ids=["function", "operator"],
)
def test_what_forward_mode_cannot_pass_is_named_with_torchs_reason(operation, reason):
    module = with_an_odd_part(operation)
    localized = localize(module, **ESTIMATE)
    before = [layer.buffer.clone() for layer in localized.layers.values()]
    match = f"module 'odd': has no derivative in forward mode. .*{reason}"
    with pytest.raises(ValueError, match=match):
        localized.align_feedback(0, forward=lambda: module(normal(6, 3)))
    for layer, old in zip(localized.layers.values(), before, strict=True):
        assert torch.equal(layer.buffer, old)
    assert module.training and torch.backends.mha.get_fastpath_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert localized.upkeep.owed == ["align_feedback"]


def test_an_error_of_the_closure_is_its_own():
    module = Pooled()
    localized = localize(module, **ESTIMATE)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        localized.align_feedback(0, forward=lambda: module(normal(B, T, 4)))
    with pytest.raises(KeyError, match="'nothing'"):
        localized.align_feedback(0, forward=lambda: {}["nothing"])


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda module: None, "forward=None: is needed by a rule that aligns to the network's Jacobian"),
        (lambda module: lambda: None, "calls of the output layer 'head'=0: must be one"),
        (lambda module: lambda: [module(normal(B, T, 3)) for _ in range(2)], "output layer 'head'=2: must"),
        (lambda module: lambda: module.head(normal(B, 6)), "output layer 'head': no layer that aligns has"),
        (
            lambda module: lambda: module.head(module.mid(module.first(normal(B, T, 3))).mean(dim=0)),
            r"input of layer 'up'=\(2, 4, 3\): must begin with the dimensions of the output, \(4, 2\)",
        ),
    ],
    ids=["none", "not", "twice", "alone", "shapes"],
)
def test_a_closure_that_is_no_pass_of_the_network_is_refused(forward, match):
    module = Pooled()
    localized = localize(module, **ESTIMATE, fa_grape_head=False)
    with pytest.raises(ValueError, match=match):
        localized.align_feedback(0, forward=forward(module))


def test_attach_is_refused_without_a_closure_before_anything_moves():
    module = Pooled()
    localized = localize(module, **ESTIMATE)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"forward=None: is needed .*: lambda: module\(x\), for instance"):
        localized.attach(optimizer)
    assert not optimizer._optimizer_step_post_hooks

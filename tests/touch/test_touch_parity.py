"""The interactives of the chapters compute what localgpt_core computes: gradients, steps, losses, angles."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from localgpt_core import LayerNormProjectedSurrogate, LayerNormSTE, VQResidualDir, localize

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which is not installed")

NEAR = {"rtol": 1e-5, "atol": 1e-8}


@pytest.fixture
def call(tmp_path):
    """Return a function that plays calls [module, function, ...arguments] and returns their results."""

    def played(*calls: list) -> list:
        file = tmp_path / "calls.json"
        file.write_text(json.dumps(calls, default=lambda tensor: tensor.tolist()))
        command = ["node", str(HERE / "calls.mjs"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return played


def assert_same(ours: object, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.double), theirs.detach().double(), **NEAR)


# ------------------------------------------------------------------------------------ feedback (chapter 03)

RULES = ["bp", "fa", "sign_sym", "kp"]
RATE, STEPS = 0.15, 4


def network(rule: str, start: dict, decay: float) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return the package's network at the state ``start``, and what trains it."""
    w1, w2, b = (torch.tensor(start[name], dtype=torch.double) for name in ("w1", "w2", "b"))
    layers = [nn.Linear(*w.T.shape, bias=False, dtype=torch.double) for w in (w1, w2)]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, weight_decay=decay)
    localize(net, method=rule).attach(optimizer)
    with torch.no_grad():
        net[0].weight.copy_(w1), net[1].weight.copy_(w2)
        if rule in ("fa", "kp"):
            net[1].feedback_weight.copy_(b)
        if rule == "sign_sym":
            net[1].feedback_scale.fill_(start["magnitude"])
    return net, optimizer


@pytest.mark.parametrize("rule", RULES)
def test_a_network_takes_the_steps_of_the_package(call, rule):
    start, decay = call(["feedback", "start", 5, 1.7], ["feedback", "DECAY"])
    assert decay > 0  # without it the feedback of Kolen-Pollack keeps its distance
    net, optimizer = network(rule, start, decay)
    x, target = (torch.tensor(start[name], dtype=torch.double) for name in ("x", "target"))
    state, weight = start, start["w2"]
    for _ in range(STEPS):
        hidden = net[0](x)
        hidden.retain_grad()
        loss = (net[1](hidden) - target).square().sum(dim=1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        grads, shown, after = call(
            ["feedback", "gradients", state, rule],
            ["feedback", "measure", state, rule],
            ["feedback", "step", state, rule, RATE],
        )
        assert shown["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(grads["signal"], hidden.grad)
        assert_same(grads["w1"], net[0].weight.grad)
        assert_same(grads["w2"], net[1].weight.grad)
        optimizer.step()
        assert_same(after["w1"], net[0].weight)
        assert_same(after["w2"], net[1].weight)
        if rule in ("fa", "kp"):
            assert_same(after["b"], net[1].feedback_weight)
        state = after
    assert state["w2"] != weight and (state["b"] != start["b"]) == (rule == "kp")


@pytest.mark.parametrize("rule", RULES)
def test_the_angles_are_those_of_weights_and_errors(call, rule):
    start, decay = call(["feedback", "start", 2, 0.5], ["feedback", "DECAY"])
    net, _ = network(rule, start, decay)
    (shown,) = call(["feedback", "measure", start, rule])
    x, target = (torch.tensor(start[name], dtype=torch.double) for name in ("x", "target"))
    w2 = net[1].weight
    e = net(x) - target
    feedback = {"bp": w2, "sign_sym": start["magnitude"] * w2.sign()}.get(rule)
    feedback = net[1].feedback_weight if feedback is None else feedback

    def degrees(a, b):
        cosine = functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
        return math.degrees(math.acos(min(1, cosine)))

    # The arc cosine near one turns the last bit of a cosine into some millionths of a degree.
    assert shown["weights"] == pytest.approx(degrees(w2, feedback), rel=1e-5, abs=1e-5)
    assert shown["errors"] == pytest.approx(degrees(e @ feedback, e @ w2), rel=1e-5, abs=1e-5)


def test_sign_symmetry_starts_with_the_magnitude_of_the_package(call):
    start, decay = call(["feedback", "start", 3, 1.0], ["feedback", "DECAY"])
    layer = nn.Sequential(nn.Linear(10, 8, bias=False, dtype=torch.double))
    layer[0].weight.data = torch.tensor(start["w2"], dtype=torch.double)
    localize(layer, method="sign_sym")
    assert start["magnitude"] == pytest.approx(layer[0].feedback_scale.item())


# ---------------------------------------------------------------------------------------- norm (chapter 08)

NORMS = {
    "exact": lambda: LayerNormProjectedSurrogate(3),
    "no radial term": lambda: LayerNormProjectedSurrogate(3, "center_scale"),
    "identity": lambda: LayerNormSTE(3),
}
# The last one is so short that eps counts, and two are not centred.
INPUTS = [[1.3, -0.4, 0.2], [-2.0, 1.5, 0.5], [0.3, 2.0, 5.0], [0.004, -0.001, 0.002]]


@pytest.mark.parametrize("kind", NORMS)
def test_the_backward_passes_of_a_norm_are_those_of_the_package(call, kind):
    a = torch.tensor([0.9, -0.2, 0.4], dtype=torch.double)
    norm = NORMS[kind]().double()
    for given in INPUTS:
        x = torch.tensor(given, dtype=torch.double, requires_grad=True)
        loss = -(norm(x) @ a)
        (grad,) = torch.autograd.grad(loss, x)
        ours = call(
            ["norm", "loss", x, a], ["norm", "gradient", kind, x, a], ["norm", "step", kind, x, a, 0.3]
        )
        for number, theirs in zip(ours, (loss, grad, x - 0.3 * grad), strict=True):
            assert_same(number, theirs)


def test_the_exact_one_is_the_derivative_of_torchs_layer_norm(call):
    a, x = torch.randn(2, 3, dtype=torch.double)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(-(functional.layer_norm(x, (3,)) @ a), x)
    assert_same(*call(["norm", "gradient", "exact", x, a]), grad)


def test_the_plane_is_that_of_centred_vectors_and_keeps_lengths(call):
    point = torch.tensor([0.7, -1.9], dtype=torch.double)
    (x,) = call(["norm", "fromPlane", point])
    assert sum(x) == pytest.approx(0) and math.hypot(*x) == pytest.approx(math.hypot(0.7, 1.9))
    back, size = call(["norm", "toPlane", x], ["norm", "length", x])
    assert_same(back, point)
    assert size == pytest.approx(math.hypot(*x))


# --------------------------------------------------------------------------------------- codes (chapter 11)

CODES = ["identity", "tangent", "rotation"]
POINTS = [[0.9, 1.2], [-0.3, 0.4], [2.0, -1.1], [-1.4, -0.2]]


def quantiser(kind: str, codes: list) -> VQResidualDir:
    vq = VQResidualDir(2, len(codes), backward=kind).double()
    vq.codebook.copy_(torch.tensor(codes))
    return vq


@pytest.mark.parametrize("K", [4, 8, 16])
@pytest.mark.parametrize("kind", CODES)
def test_the_backward_passes_of_codes_are_those_of_the_package(call, kind, K):
    (codes,) = call(["codes", "codebook", K])
    vq = quantiser(kind, codes)
    a = torch.tensor([0.8, 0.6], dtype=torch.double)
    for given in POINTS:
        h = torch.tensor(given, dtype=torch.double, requires_grad=True)
        q = vq(h)
        q.retain_grad()
        loss = -(functional.normalize(q, dim=0) @ a)
        loss.backward()
        nearest, *ours = call(
            ["codes", "nearest", h, codes],
            ["codes", "quantised", h, codes],
            ["codes", "loss", h, codes, a],
            ["codes", "atCode", h, codes, a],
            ["codes", "gradient", kind, h, codes, a],
            ["codes", "step", kind, h, codes, a, 0.4],
        )
        assert nearest == vq.codes(h)
        theirs = (q, loss, q.grad, h.grad, h - 0.4 * h.grad)
        for number, expected in zip(ours, theirs, strict=True):
            assert_same(number, expected)


@pytest.mark.parametrize("kind", CODES)
def test_a_gradient_that_is_not_at_right_angles_to_the_code_goes_back_alike(call, kind):
    """The loss of the page has no gradient along the code; the formulas hold for any."""
    (codes,) = call(["codes", "codebook", 8])
    vq, g = quantiser(kind, codes), torch.tensor([1.7, -0.6], dtype=torch.double)
    for given in POINTS:
        h = torch.tensor(given, dtype=torch.double, requires_grad=True)
        (grad,) = torch.autograd.grad(vq(h), h, g)
        u, code = functional.normalize(h, dim=0), vq.codebook[vq.codes(h)]
        assert_same(*call(["codes", f"BACKWARDS.{kind}", g, u, code]), grad)


def test_codes_are_of_length_one_and_all_different(call):
    (codes,) = call(["codes", "codebook", 16])
    assert [math.hypot(*code) for code in codes] == pytest.approx([1] * 16)
    assert len({tuple(code) for code in codes}) == 16


@pytest.mark.parametrize("module", ["norm", "codes"])
def test_a_cosine_with_next_to_nothing_is_none(call, module):
    right, rounding = call([module, "cosine", [3, 4], [4, 3]], [module, "cosine", [1e-12, 0], [4, 3]])
    assert right == pytest.approx(0.96) and rounding is None

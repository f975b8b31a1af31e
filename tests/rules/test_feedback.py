"""Feedback that moves, and feedback between blocks: by hand, in its limits, and what it promises."""

import math

import pytest
import torch
from cases import SIZES, make_batch, make_layer, make_model, model_gradients, normal
from torch import nn
from torch.nn import functional

from localgpt_core import RULES, LocalGPTConfig, RuleOptions, TrainConfig
from localgpt_core.common.modes import in_float32
from localgpt_core.common.seeds import generator
from localgpt_core.layers.feedback_points import FeedbackPoint
from localgpt_core.layers.linear import publish_error
from localgpt_core.matrices.grape import basis_by_cholesky, project_to_weight
from localgpt_core.matrices.initial import initial_feedback
from localgpt_core.matrices.jacobian import jvp_estimates, mean_jacobians
from localgpt_core.measure.alignment import feedback_cosines
from localgpt_core.training.step import build_model, build_optimizer, learning_rate, training_step

TRAIN = TrainConfig(seed=4, steps=12, batch_size=2, warmup=3, lr=1e-2, weight_decay=0.5, precision="float64")
W = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]], dtype=torch.float64)
F = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 5.0]], dtype=torch.float64)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_backprop(model, idx, targets, limit: float = 1e-12) -> None:
    """Compare every gradient of ``model`` with backpropagation's at the same weights."""
    exact = make_model()
    exact.load_state_dict(model.state_dict(), strict=False)
    expected = model_gradients(exact, idx, targets)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in model_gradients(model, idx, targets).items():
        torch.testing.assert_close(gradient, expected[name], rtol=limit, atol=limit * largest, msg=name)


# ------------------------------------------------------------ Kolen-Pollack


@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
def test_kolen_pollack_shrinks_the_difference_by_the_weight_decay_and_nothing_else(grad_clip):
    config = TrainConfig(**{**TRAIN.__dict__, "grad_clip": grad_clip})
    model = build_model(LocalGPTConfig(**SIZES, method="kp", bias=True), config)
    optimizer = build_optimizer(model, config)
    idx, targets = make_batch()
    for step in range(config.steps):
        before = [(weight - feedback).detach().clone() for weight, feedback in model.mirrored()]
        weights = [weight.detach().clone() for weight, _ in model.mirrored()]
        training_step(model, optimizer, config, idx, targets, step)
        factor = 1 - learning_rate(step, config) * config.weight_decay
        pairs = list(model.mirrored())
        assert len(pairs) == 13
        for (weight, feedback), gap, old in zip(pairs, before, weights, strict=True):
            torch.testing.assert_close(weight - feedback, factor * gap, rtol=1e-11, atol=1e-15)
            assert not torch.equal(weight, old)


def test_without_decay_the_difference_of_kolen_pollack_stays():
    config = TrainConfig(**{**TRAIN.__dict__, "weight_decay": 0.0})
    model = build_model(LocalGPTConfig(**SIZES, method="kp"), config)
    optimizer = build_optimizer(model, config)
    start = model.head.weight.detach() - model.head.feedback_weight
    for step in range(3):
        training_step(model, optimizer, config, *make_batch(), step)
    weight, feedback = model.head.weight.grad, model.head.feedback_weight.grad
    assert torch.equal(feedback, weight)
    torch.testing.assert_close(model.head.weight - model.head.feedback_weight, start, rtol=1e-10, atol=1e-15)


def test_a_frozen_weight_and_its_feedback_stay():
    config = TrainConfig(**{**TRAIN.__dict__, "freeze_body": True})
    model = build_model(LocalGPTConfig(**SIZES, method="kp"), config)
    assert [weight is model.head.weight for weight, _ in model.mirrored()] == [True]


# ------------------------------------------------------------ weight mirror


def test_one_mirror_update_by_hand():
    layer = make_layer(3, 2, method="wm", mirror_n_probe=4, mirror_rate=0.3)
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.feedback_weight.copy_(F)
    noise = torch.randn(4, 3, generator=generator("probes", 0), dtype=torch.float64)
    expected = 0.7 * F
    for xi in noise:
        expected = expected + 0.3 / 4 * torch.outer(W @ xi, xi)
    layer.align_feedback("probes", 0)
    torch.testing.assert_close(layer.feedback_weight, expected, rtol=1e-12, atol=1e-14)


def test_the_mirror_settles_at_the_weight_with_the_stated_fluctuation():
    n, rate, (out, columns) = 20, 0.2, (6, 5)
    layer = make_layer(columns, out, method="wm", mirror_n_probe=n, mirror_rate=rate)
    weight = layer.weight.detach()
    errors, mean, steps = [], torch.zeros_like(weight), 2000
    for step in range(-50, steps):
        layer.align_feedback(step)
        if step >= 0:
            errors.append(relative(layer.feedback_weight, weight) ** 2)
            mean += layer.feedback_weight / steps
    # Some 200 independent states of 30 entries: 10 % is beyond four standard errors.
    assert sum(errors) / steps == pytest.approx(rate / (2 - rate) * (columns + 1) / n, rel=0.1)
    assert relative(mean, weight) < 4 * math.sqrt((columns + 1) / n / steps)


# ------------------------------------------------------------ block Kaczmarz


def test_one_probe_of_kaczmarz_by_hand():
    feedback = F.clone()
    project_to_weight(W, feedback, 1, 0.5, generator(0))
    v = torch.randn(3, 1, generator=generator(0), dtype=torch.float64)
    expected = F + 0.5 * (W - F) @ v @ v.T / (v.T @ v)
    torch.testing.assert_close(feedback, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=str)
def test_kaczmarz_is_exact_on_what_it_probed(shape):
    weight, feedback = normal(*shape), normal(*shape, seed=1)
    project_to_weight(weight, feedback, 3, 1.0, generator(0))
    probes = torch.randn(shape[1], 3, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(feedback @ probes, weight @ probes, rtol=1e-12, atol=1e-12)
    assert relative(feedback, weight) > 0.1
    for n_probe in (shape[1], shape[1] + 5):
        project_to_weight(weight, feedback := normal(*shape, seed=1), n_probe, 1.0, generator(0))
        assert relative(feedback, weight) < 1e-12


@pytest.mark.parametrize("n_probe", [1, 32, 192])
def test_the_basis_of_a_gpu_is_that_of_qr(n_probe):
    probes = torch.randn(384, n_probe, generator=generator(0))
    expected, found = torch.linalg.qr(probes.double()).Q, basis_by_cholesky(probes).double()
    torch.testing.assert_close(found.T @ found, torch.eye(n_probe, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-5)


def test_kaczmarz_takes_the_share_of_the_probes_off_the_misalignment():
    weight, start, n_probe, columns = normal(4, 9), normal(4, 9, seed=1), 2, 9
    left = []
    for seed in range(400):
        feedback = start.clone()
        project_to_weight(weight, feedback, n_probe, 1.0, generator(seed))
        left.append(((weight - feedback).norm() / (weight - start).norm()).item() ** 2)
    assert sum(left) / len(left) == pytest.approx(1 - n_probe / columns, abs=0.02)


# ------------------------------------------------------------ sign symmetry with random magnitudes


def test_random_magnitudes_are_half_normal_with_the_mean_of_the_weights():
    layer = make_layer(80, 60, method="sign_sym", sign_magnitude="random")
    layer.reset_feedback("key")
    scale, mean = layer.feedback_scale, layer.weight.detach().abs().mean().item()
    # A half-normal's standard deviation is 0.756 of its mean.
    assert scale.shape == (60, 80) and (scale > 0).all()
    assert scale.mean().item() == pytest.approx(mean, rel=4 * 0.756 / math.sqrt(4800))
    assert (scale.std() / scale.mean()).item() == pytest.approx(0.756, rel=0.06)
    first = scale.clone()
    layer.reset_feedback("key")
    assert torch.equal(layer.feedback_scale, first)
    layer.reset_feedback("another key")
    assert not torch.equal(layer.feedback_scale, first)


def test_random_magnitudes_stay_while_the_signs_follow():
    model = build_model(LocalGPTConfig(**SIZES, method="sign_sym", sign_magnitude="random"), TRAIN)
    optimizer = build_optimizer(model, TRAIN)
    before = {n: b.clone() for n, b in model.named_buffers() if "feedback" in n}
    weight = model.head.weight.detach().clone()
    for step in range(3):
        training_step(model, optimizer, TRAIN, *make_batch(), step)
    assert before and all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in before.items())
    head = model.head
    assert not torch.equal(head.weight.sign(), weight.sign())
    found = head.rule.feedback(head.weight.detach(), head.buffer)
    assert torch.equal(found, head.weight.detach().sign() * head.feedback_scale)


# ------------------------------------------------------------ feedback points

ERROR = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)


def point_gradient(point: FeedbackPoint, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x when ERROR is the output's error and something else arrives from above."""
    x = x.clone().requires_grad_(True)
    taps: list[torch.Tensor] = []
    y = point(x, taps)
    assert torch.equal(y, x) and [tuple(tap.shape) for tap in taps] == [(2, 2)]
    output = publish_error(torch.zeros(2, 2, dtype=torch.float64, requires_grad=True), taps)
    torch.autograd.backward([y, output], [torch.full_like(y, 100.0), ERROR])
    return x.grad


@pytest.mark.parametrize("norm", [False, True])
def test_a_feedback_point_by_hand(norm):
    point = FeedbackPoint(3, 2, RuleOptions(method="dfa"), norm).double()
    point.feedback_weight.copy_(F)
    x = torch.tensor([[1.0, 2.0, 6.0], [-1.0, 0.0, 4.0]], dtype=torch.float64)
    # e F with pencil and paper: what arrives from above is dropped.
    entered = torch.tensor([[4.0, -2.0, -9.0], [1.0, 0.0, 0.5]], dtype=torch.float64)
    expected = entered
    if norm:
        leaf = x.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(functional.layer_norm(leaf, (3,)), leaf, entered)
        assert not torch.allclose(expected, entered)
        torch.testing.assert_close((expected * x).sum(-1), torch.zeros(2).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(point_gradient(point, x), expected, rtol=1e-12, atol=1e-13)


def test_a_feedback_point_is_transparent_without_gradients_and_where_derivatives_are_exact():
    point = FeedbackPoint(3, 2, RuleOptions(method="dfa"))
    x, taps = torch.randn(2, 3, requires_grad=True), []
    with torch.no_grad():
        assert point(x, taps) is x
    point.exact = True
    assert point(x, taps) is x and taps == []


def test_a_feedback_point_needs_a_rule_with_the_outputs_error_and_a_published_tap():
    with pytest.raises(ValueError, match="method='fa': must be a rule that uses the output's error"):
        FeedbackPoint(3, 2, RuleOptions(method="fa"))
    for sizes in ((0, 2), (3, 0)):
        with pytest.raises(ValueError, match="(width|error_features)=0: must be an integer of at least 1"):
            FeedbackPoint(*sizes, RuleOptions(method="dfa"))
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="layer 0: no error of the network's output reached it"):
        FeedbackPoint(3, 2, RuleOptions(method="dfa"))(x, []).sum().backward()
    assert "3, method='dfa', norm=True" in repr(FeedbackPoint(3, 2, RuleOptions(method="dfa"), norm=True))


@pytest.mark.parametrize("granularity", ["sublayer", "block"])
def test_where_feedback_comes_in(granularity):
    model = make_model(method="dfa", dfa_granularity=granularity)
    points = [name for name, module in model.named_modules() if isinstance(module, FeedbackPoint)]
    ends = ["feedback_attn", "feedback"] if granularity == "sublayer" else ["feedback"]
    assert points == [f"blocks.{i}.{end}" for i in range(2) for end in ends]
    methods = {layer.rule.options.method for layer in model.local_linears() if layer is not model.head}
    assert methods == {"bp"} and model.head.rule.options.method == "dfa"


# ------------------------------------------------------------ limits that are backpropagation


@pytest.mark.parametrize("granularity", ["sublayer", "block"])
def test_behind_a_norm_the_heads_weight_times_gamma_is_backpropagation(granularity):
    # Directly below ln_f the Jacobian is W diag(gamma) times LayerNorm's own, which the point brings along.
    model = make_model(method="dfa", dfa_granularity=granularity, dfa_norm=True)
    model.head.feedback_weight.copy_(model.head.weight.detach())
    model.blocks[-1].feedback.feedback_weight.copy_((model.head.weight * model.ln_f.weight).detach())
    exact = make_model()
    idx, targets = make_batch()
    gradients, expected = (model_gradients(m, idx, targets) for m in (model, exact))
    below = "blocks.1." if granularity == "block" else "blocks.1.mlp"
    compared = [name for name in expected if name.startswith((below, "ln_f", "head"))]
    assert len(compared) > 4
    for name in compared:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-12, atol=1e-15, msg=name)
    assert not torch.allclose(gradients["blocks.0.mlp.fc.weight"], expected["blocks.0.mlp.fc.weight"])


def own_jacobians(model, idx) -> dict:
    places = {place for place in model.feedback_places() if place.rule.error == "output"}
    return mean_jacobians(model, lambda: model.logits(idx), places, 0)


@pytest.mark.parametrize("granularity", ["layer", "sublayer", "block"])
def test_with_a_single_token_the_jacobian_as_feedback_is_backpropagation(granularity):
    # Every error of that token is e J exactly, at every place and whatever lies between.
    model = make_model(method="dfa", dfa_granularity=granularity)
    idx, targets = (ids[:1, :1] for ids in make_batch())
    for place, jacobian in own_jacobians(model, idx).items():
        place.feedback_weight.copy_(jacobian)
    assert_backprop(model, idx, targets)
    cosines = feedback_cosines(model, idx)
    assert len(cosines) == {"layer": 13, "sublayer": 5, "block": 3}[granularity]
    assert all(value == pytest.approx(1, abs=1e-12) for value in cosines.values())


# ------------------------------------------------------------ the Jacobian

PLACES = ["blocks.0.attn.o_proj", "blocks.1.mlp.proj", "head"]


def true_jacobian(name: str, idx: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of d logits / d input of layer ``name``, own token only, by autograd."""
    model = make_model().eval()
    layer = model.get_submodule(name)

    def logits(change):
        hook = layer.register_forward_pre_hook(lambda module, args: (args[0] + change, *args[1:]))
        try:
            return model(idx)[0]
        finally:
            hook.remove()

    zeros = torch.zeros(*idx.shape, layer.in_features, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(logits, zeros)
    rows, columns = idx.shape
    return sum(jacobian[b, t, :, b, t] for b in range(rows) for t in range(columns)) / idx.numel()


def estimated(model, idx, repeats: int, passes: int, estimate) -> dict[str, torch.Tensor]:
    """Return the mean of ``repeats * passes`` estimates; rows that are repeated have noise of their own."""
    names = {model.get_submodule(name): name for name in PLACES}
    total = dict.fromkeys(PLACES, 0.0)
    for key in range(passes):
        tiled = idx.repeat(repeats, 1)
        found = estimate(model, lambda ids=tiled: model.logits(ids), {*names}, key)
        assert found.keys() == names.keys()
        for place, value in found.items():
            total[names[place]] = total[names[place]] + value / passes
    return total


@pytest.mark.parametrize(("estimate", "repeats"), [(jvp_estimates, 200), (mean_jacobians, 8)])
def test_the_estimates_converge_to_the_true_jacobian(estimate, repeats):
    model = make_model(method="dfa", fa_grape=True, dropout=0.5)
    idx, _ = make_batch()
    few = estimated(model, idx, repeats, 1, estimate)
    many = estimated(model, idx, repeats, 16, estimate)
    for name in PLACES:
        expected = true_jacobian(name, idx)
        errors = [relative(found[name], expected) for found in (few, many)]
        # 3200 probes of every token, or 128 draws of signs, and 16 times fewer with 4 times the error.
        assert errors[1] < 0.15, (name, errors)
        if name != PLACES[0] and estimate is mean_jacobians:
            assert errors[1] < 1e-12  # behind the last attention a token reaches its own logits only
        else:
            assert 2 < errors[0] / errors[1] < 8, (name, errors)


@pytest.mark.parametrize("norm", [False, True])
def test_estimates_at_feedback_points(norm):
    # The stream below ln_f: J = W diag(gamma) J_norm, with respect to x, or to z = x / sigma behind a norm.
    model = make_model(method="dfa", dfa_granularity="block", dfa_norm=norm)
    idx, _ = make_batch()
    block, seen = model.blocks[-1], []
    hook = block.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        model(idx)
    hook.remove()
    x = seen[0].flatten(0, 1)
    weight, gamma = model.head.weight.detach(), model.ln_f.weight.detach()
    total = torch.zeros(7, 12, dtype=torch.float64)
    for token in x:
        own = torch.autograd.functional.jacobian(
            lambda t: weight @ (functional.layer_norm(t, (12,)) * gamma), token
        )
        sigma = (token.var(correction=0) + 1e-5).sqrt()
        total += own * (sigma if norm else 1) / len(x)
    found = mean_jacobians(model, lambda: model.logits(idx), {block.feedback}, 0)[block.feedback]
    torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-12)


def test_measuring_jacobians_leaves_model_and_random_state_alone():
    model = make_model(method="dfa", fa_grape=True, dropout=0.5).train()
    idx, _ = make_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    places = {model.head}
    for estimate in (jvp_estimates, mean_jacobians):
        estimate(model, lambda: model.logits(idx), places, 0)
        with pytest.raises(ZeroDivisionError):
            estimate(model, lambda: 1 / 0, places, 0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training and "exact" not in vars(module) for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------ network-level GrAPE and FDFA

J_HAT = torch.tensor([[2.0, -1.0, 0.0], [0.0, -1.0, 3.0]], dtype=torch.float64)


def network_rule(**options):
    return make_layer(3, 2, method="dfa", fa_grape=True, is_output=True, **options)


def test_one_column_update_by_hand():
    layer = network_rule(jvp_rate=0.5)
    buffer = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, -2.0]], dtype=torch.float64)
    layer.rule.align_to_jacobian(buffer, J_HAT)
    # (3, 4) towards (2, 0): unit (0.6, 0.8), cosine 0.6, so (0.6, 0.8) + 0.5 (0.64, -0.48), norm sqrt(1.16).
    # (1, 1) and (-1, -1) are opposite, (0, -2) and (0, 3) too: nothing to turn to.
    first = [5 * 0.92 / math.sqrt(1.16), 5 * 0.56 / math.sqrt(1.16)]
    expected = torch.tensor([[first[0], 1.0, 0.0], [first[1], 1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


def test_fdfa_by_hand_is_the_running_mean():
    layer = network_rule(jvp_update="fdfa", jvp_rate=0.25)
    buffer, expected = F.clone(), F
    for _ in range(3):
        layer.rule.align_to_jacobian(buffer, J_HAT)
        expected = 0.75 * expected + 0.25 * J_HAT
    torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("update", ["grape", "fdfa"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_feedback_turns_to_the_jacobian_of_the_network(update, granularity):
    options = {"jvp_update": update, "jvp_rate": 0.1, "dfa_granularity": granularity}
    model = make_model(method="dfa", fa_grape=True, **options)
    idx = make_batch()[0].repeat(30, 1)
    aligned = {name: place for name, place in model.named_modules() if getattr(place, "tap_features", None)}
    norms = {name: place.buffer.norm(dim=0) for name, place in aligned.items()}
    before = feedback_cosines(model, idx)
    for step in range(60):
        model.align_feedback("probes", step, idx=idx)
    after = feedback_cosines(model, idx)
    # Where the logits answer strongly; what a key does to them drowns in the noise of the other places.
    strong = [name for name in after if name.endswith(("o_proj", "mlp.proj", "head", "feedback"))]
    assert len(strong) >= 3
    assert all(after[name] > 0.8 > before[name] + 0.5 for name in strong), after
    if update == "grape":
        for name, place in aligned.items():
            torch.testing.assert_close(place.buffer.norm(dim=0), norms[name], rtol=1e-12, atol=0)


def test_the_head_is_aligned_to_the_network_only_where_asked_for():
    moved = []
    for head in (True, False):
        model = make_model(method="dfa", fa_grape=True, fa_grape_head=head)
        before = model.head.feedback_weight.clone()
        model.align_feedback(0, idx=make_batch()[0])
        moved.append(not torch.equal(model.head.feedback_weight, before))
    assert moved == [True, False]


def test_alignment_to_the_network_needs_tokens():
    with pytest.raises(
        ValueError, match="idx=None: needs tokens: this rule aligns to the network's Jacobian"
    ):
        make_model(method="dfa", fa_grape=True).align_feedback(0)


def test_a_column_without_direction_stays_finite():
    layer = network_rule(jvp_rate=0.5)
    buffer = F.clone()
    layer.rule.align_to_jacobian(buffer, torch.zeros_like(F))
    torch.testing.assert_close(buffer, F, rtol=1e-12, atol=0)
    layer.rule.align_to_jacobian(zeros := torch.zeros_like(F), J_HAT)
    assert not zeros.any()


# ------------------------------------------------------------ cosines of the feedback


@pytest.mark.parametrize("method", ["fa", "kp", "wm"])
def test_the_cosine_of_feedback_with_its_weight(method):
    model = make_model(method=method)
    idx, _ = make_batch()
    by_hand = {
        name: nn.CosineSimilarity(dim=0)(layer.weight.flatten(), layer.feedback_weight.flatten()).item()
        for name, layer in model.named_modules()
        if hasattr(layer, "feedback_weight")
    }
    assert feedback_cosines(model, idx) == pytest.approx(by_hand, rel=1e-12)
    for layer in model.local_linears():
        layer.feedback_weight.copy_(3 * layer.weight.detach())
    assert all(value == pytest.approx(1, rel=1e-12) for value in feedback_cosines(model, idx).values())
    model.head.feedback_weight.zero_()
    assert math.isnan(feedback_cosines(model, idx)["head"])


def test_sign_symmetry_has_a_cosine_and_backpropagation_has_none():
    idx, _ = make_batch()
    assert feedback_cosines(make_model(), idx) == {}
    cosines = feedback_cosines(make_model(method="sign_sym"), idx)
    # sign(w) and Gaussian w: sqrt(2 / pi) = 0.798.
    assert len(cosines) == 13 and all(0.65 < value < 0.9 for value in cosines.values())


# ------------------------------------------------------------ half precision and autocast


MOVES = {
    "cosine": {"method": "fa", "fa_grape": True},
    "kaczmarz": {"method": "fa", "fa_grape": True, "fa_grape_update": "kaczmarz", "fa_grape_n_probe": 3},
    "kp": {"method": "kp", "fa_grape": True, "fa_grape_update": "kaczmarz"},
    "mirror": {"method": "wm"},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", MOVES.values(), ids=MOVES)
def test_feedback_of_half_precision_moves_in_float32_and_is_rounded(options, dtype):
    half = make_layer(8, 5, dtype=dtype, **options)
    whole = make_layer(8, 5, dtype=torch.float32, **options)
    whole.load_state_dict(half.state_dict())
    weight, version = half.weight.detach().clone(), half.weight._version
    for layer in (half, whole):
        layer.align_feedback("key")
    assert half.feedback_weight.dtype == dtype
    assert torch.equal(half.feedback_weight, whole.feedback_weight.to(dtype))
    assert torch.equal(half.weight, weight) and half.weight._version == version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("update", ["grape", "fdfa"])
def test_feedback_of_half_precision_follows_a_jacobian_in_float32(update, dtype):
    options = RuleOptions(method="dfa", fa_grape=True, jvp_update=update)
    rule, estimate = RULES["dfa"](options), normal(5, 8)
    estimate[:, 2] = 0
    buffer = normal(5, 8, seed=1, dtype=dtype)
    expected = buffer.float()
    rule.align_to_jacobian(expected, estimate.float())
    rule.align_to_jacobian(buffer, estimate.to(dtype).float())
    assert buffer.dtype == dtype and buffer.isfinite().all()
    torch.testing.assert_close(buffer.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", MOVES.values(), ids=MOVES)
def test_feedback_moves_the_same_under_autocast(options):
    layers = [make_layer(8, 5, dtype=torch.float32, **options) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[0].align_feedback("key")
    with torch.autocast("cpu", torch.bfloat16):
        layers[1].align_feedback("key")
    assert torch.equal(layers[0].feedback_weight, layers[1].feedback_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["orthogonal", "ortho_he", "gaussian", "sparse"])
def test_feedback_of_half_precision_starts_as_that_of_float32_rounded(mode, dtype):
    options = RuleOptions(method="fa", fa_init_mode=mode)
    half, whole = (
        initial_feedback(options, 5, torch.ones(5, 8, dtype=d), generator(1)) for d in (dtype, None)
    )
    assert half.dtype == dtype and torch.equal(half, whole.to(dtype))


def test_functions_in_float32_hand_back_what_they_changed_and_what_they_return():
    @in_float32
    def function(a, b, *, c):
        assert {a.dtype, b.dtype, c.dtype} == {torch.float32} and not torch.is_autocast_enabled("cpu")
        b.add_(1)
        return a + c

    a, b, c = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16), torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(a, b, c=c).dtype == torch.bfloat16
    assert b.dtype == torch.float16 and b.tolist() == [2, 2] and a._version == c._version == 0

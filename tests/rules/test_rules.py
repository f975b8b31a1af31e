"""The parts of single rules: how feedback starts, GrAPE, and the options that a rule refuses."""

import math

import pytest
import torch
from cases import make_layer, make_model, normal

from localgpt_core import RULES, RuleOptions
from localgpt_core.common.seeds import generator, seed_from
from localgpt_core.matrices.grape import align_to_weight
from localgpt_core.matrices.initial import initial_feedback
from localgpt_core.rules.base import LearningRule, Registry

# ------------------------------------------------------------ feedback_init

SHAPES = [(48, 12), (12, 48), (13, 13), (7, 33)]
WIDE = (200, 320)


def start(mode: str, shape: tuple[int, int], seed: int = 0, dtype=torch.float64, **options) -> torch.Tensor:
    """Return the feedback of a layer with ``shape = (error_features, in_features)``."""
    weight = torch.empty(5, shape[1], dtype=dtype)
    return initial_feedback(
        RuleOptions(method="dfa", fa_init_mode=mode, **options), shape[0], weight, generator(seed)
    )


def rms(x: torch.Tensor, **dim) -> torch.Tensor:
    return x.square().mean(**dim).sqrt()


@pytest.mark.parametrize("mode", ["gaussian", "orthogonal", "ortho_he", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_feedback_has_its_shape_seed_and_dtype(mode, shape):
    feedback = start(mode, shape)
    assert feedback.shape == shape
    assert torch.equal(feedback, start(mode, shape))
    assert not torch.equal(feedback, start(mode, shape, seed=1))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(start(mode, shape, dtype=dtype), feedback.to(dtype))


def test_gaussian_feedback():
    feedback = start("gaussian", WIDE, feedback_std=0.3)
    n = feedback.numel()
    # Mean, standard deviation and fourth moment of n normal numbers, within 4 standard errors.
    assert abs(feedback.mean()) < 4 * 0.3 / math.sqrt(n)
    assert rms(feedback).item() == pytest.approx(0.3, rel=4 / math.sqrt(2 * n))
    assert (feedback / 0.3).pow(4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    assert rms(start("gaussian", WIDE)).item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * n))
    # Marchenko-Pastur: the spectrum of a Gaussian matrix is wide, which is what orthogonal removes.
    values = torch.linalg.svdvals(feedback)
    assert values[0] / values[-1] > 5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "std"), [("orthogonal", None), ("orthogonal", 0.5), ("ortho_he", None)], ids=str
)
def test_semi_orthogonal_feedback(mode, std, shape):
    feedback = start(mode, shape, **({} if std is None else {"feedback_std": std}))
    entry = math.sqrt(2 / shape[0]) if mode == "ortho_he" else (std or 0.02)
    assert rms(feedback).item() == pytest.approx(entry, rel=1e-12)
    values = torch.linalg.svdvals(feedback)
    torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-12, atol=0)


def test_semi_orthogonal_feedback_is_uniform():
    # Without the correction of R's signs the first column of Q would lean to one side.
    corners = torch.stack([start("orthogonal", (4, 4), seed=seed)[0, 0] for seed in range(400)]).sign()
    assert abs(corners.mean()) < 4 / math.sqrt(400)


@pytest.mark.parametrize(
    ("k", "columns", "expected"), [(3, 40, 3), (40, 40, 40), (0, 40, 2), (0, 33, 2), (0, 5, 1), (1, 1, 1)]
)
def test_sparse_feedback(k, columns, expected):
    feedback = start("sparse", (30, columns), fa_sparse_k=k, feedback_std=0.3)
    assert feedback.ne(0).sum(1).tolist() == [expected] * 30
    expected_rms = torch.full((30,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(rms(feedback, dim=1), expected_rms, rtol=1e-12, atol=0)


def test_sparse_places_are_random():
    places = start("sparse", (3000, 12), fa_sparse_k=3).ne(0)
    # Each column is used by a quarter of the rows, within 4 standard errors, and rows differ.
    share = places.double().mean(0)
    assert (share - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 3000)
    assert len({tuple(row) for row in places.tolist()}) == math.comb(12, 3)


def test_sparse_feedback_cannot_have_more_entries_than_columns():
    with pytest.raises(ValueError, match="fa_sparse_k=13: must be at most in_features=12"):
        start("sparse", (4, 12), fa_sparse_k=13)


def test_a_feedback_seed_means_the_same_matrix_in_every_layer_object():
    layers = [make_layer(method="fa", feedback_seed=5) for _ in range(2)]
    assert torch.equal(layers[0].feedback_weight, layers[1].feedback_weight)
    unseeded = [make_layer(method="fa") for _ in range(2)]
    assert not torch.equal(unseeded[0].feedback_weight, unseeded[1].feedback_weight)


def test_without_a_seed_the_feedback_follows_the_global_generator():
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append(make_layer(method="fa").feedback_weight)
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], layers[2])


# ------------------------------------------------------------ sign_sym


def test_sign_symmetry_keeps_one_scale_and_follows_the_signs():
    layer = make_layer(4, 3, method="sign_sym")
    layer.reset_feedback(0)
    scale = layer.weight.detach().abs().mean()
    assert torch.equal(layer.feedback_scale, scale) and layer.feedback_scale.ndim == 0
    with torch.no_grad():
        layer.weight.copy_(-2 * layer.weight)
    assert torch.equal(layer.feedback_scale, scale)
    weight = layer.weight.detach()
    assert torch.equal(layer.rule.feedback(weight, layer.buffer), scale * weight.sign())


# ------------------------------------------------------------ grape

# out x in. A layer with one output has no direction to align: cos(y, y_hat) is 1 or -1 whatever the probe.
ALIGNED = [((2, 9), 1, 150), ((3, 7), 1, 120), ((7, 3), 1, 60), ((5, 1), 1, 40)]
ALIGNED += [((2, 9), 32, 25), ((17, 5), 32, 15), ((40, 10), 32, 15), ((12, 48), 32, 30)]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (torch.sum(a * b) / (a.norm() * b.norm())).item()


def pair(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(*shape, seed=seed), 0.02 * normal(*shape, seed=seed + 100)


@pytest.mark.parametrize(("shape", "n_probe", "steps"), ALIGNED, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_feedback_turns_to_the_weight(shape, n_probe, steps, seed):
    weight, feedback = pair(shape, seed)
    kept = weight.clone()
    assert cosine(weight, feedback) < 0.8
    source = generator(seed)
    for _ in range(2 * steps):
        align_to_weight(weight, feedback, n_probe, 1.0, source)
    assert cosine(weight, feedback) > 0.99
    # And its norm, which started 50 times too small, follows.
    assert feedback.norm().item() == pytest.approx(weight.norm().item(), rel=0.01)
    assert torch.equal(weight, kept)


def test_the_misalignment_loses_its_share_at_every_step():
    # The documented rate n / (n + d + 1), close to alignment and averaged over many draws.
    n_probe, (out, columns) = 16, (60, 24)
    weight = normal(out, columns)
    apart = 1e-3 * normal(out, columns, seed=1)
    left = []
    for seed in range(40):
        feedback = weight + apart
        align_to_weight(weight, feedback, n_probe, 1.0, generator(seed))
        left.append((1 - cosine(weight, feedback)) / (1 - cosine(weight, weight + apart)))
    assert sum(left) / len(left) == pytest.approx(1 - n_probe / (n_probe + columns + 1), abs=0.03)


def test_one_step_is_the_gradient_of_one_minus_cosine():
    weight = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]], dtype=torch.float64)
    feedback = torch.tensor([[0.2, 0.1, 0.4], [-0.3, 0.5, 0.1]], dtype=torch.float64)
    n_probe, lr = 4, 0.7
    probes = torch.randn(n_probe, 3, generator=generator("probes"), dtype=torch.float64)
    before = feedback.clone().requires_grad_(True)
    y, y_hat = probes @ weight.T, probes @ before.T
    loss = 1 - torch.nn.functional.cosine_similarity(y_hat, y, dim=1)
    # |y_hat_i| scales each probe's gradient, which takes the length of the feedback out of it.
    (gradient,) = torch.autograd.grad((loss * y_hat.detach().norm(dim=1)).mean(), before)
    size = (y.norm() / math.sqrt(n_probe)).item()
    rate = lr * n_probe / (n_probe + 3 + 1)
    scale = (y.norm() / y_hat.detach().norm()).item()
    align_to_weight(weight, feedback, n_probe, lr, generator("probes"))
    expected = scale * before.detach() - rate * size * gradient
    torch.testing.assert_close(feedback, expected, rtol=1e-12, atol=1e-14)


def test_aligned_feedback_stays_where_it_is():
    weight, _ = pair((5, 7))
    feedback = weight.clone()
    align_to_weight(weight, feedback, 3, 1.0, generator(0))
    torch.testing.assert_close(feedback, weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dead", ["weight", "feedback", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_without_response_is_left_alone(dead, dtype):
    weight, feedback = (x.to(dtype) for x in pair((5, 7)))
    if dead in ("weight", "both"):
        weight.zero_()
    if dead in ("feedback", "both"):
        feedback.zero_()
    before = feedback.clone()
    align_to_weight(weight, feedback, 3, 1.0, generator(0))
    assert torch.equal(feedback, before)


def test_outputs_that_never_respond_keep_the_feedback_finite():
    weight, feedback = pair((5, 7))
    weight[2], feedback[3] = 0.0, 0.0
    for step in range(60):
        align_to_weight(weight, feedback, 32, 1.0, generator(step))
    assert feedback.isfinite().all()
    assert cosine(weight, feedback) > 0.99


def test_a_single_output_has_no_direction_to_follow():
    weight, feedback = pair((1, 7))
    before = cosine(weight, feedback)
    align_to_weight(weight, feedback, 32, 1.0, generator(0))
    assert cosine(weight, feedback) == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize("head", [True, False])
def test_grape_aligns_every_layer_and_the_head_only_where_asked_for(head):
    model = make_model(method="fa", fa_grape=True, fa_grape_head=head)
    for step in range(60):
        model.align_feedback("probes", step)
    for layer in model.local_linears():
        aligned = cosine(layer.weight.detach(), layer.feedback_weight)
        assert aligned > 0.99 if head or layer is not model.head else abs(aligned) < 0.5


def test_grape_options_reach_the_step():
    base = make_layer(4, 3, method="fa", fa_grape=True, feedback_seed=1)
    for options in ({"fa_grape_n_probe": 5}, {"fa_grape_lr": 0.5}):
        torch.manual_seed(0)
        first = make_layer(4, 3, method="fa", fa_grape=True, feedback_seed=1)
        torch.manual_seed(0)
        second = make_layer(4, 3, method="fa", fa_grape=True, feedback_seed=1, **options)
        assert torch.equal(first.feedback_weight, second.feedback_weight)
        assert torch.equal(first.feedback_weight, base.feedback_weight)
        for layer in (first, second):
            layer.align_feedback("probes", 0)
        assert not torch.equal(first.feedback_weight, second.feedback_weight)


def test_grape_reads_neither_data_nor_gradients():
    aligned = []
    for seed in (1, 2):
        model = make_model(method="fa", fa_grape=True)
        ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(seed))
        model(ids, ids.flip(1))[1].backward()
        model.align_feedback("probes", 0)
        aligned.append(torch.cat([layer.feedback_weight.flatten() for layer in model.local_linears()]))
    assert torch.equal(*aligned)


# ------------------------------------------------------------ options

REFUSED = {
    "unknown rule": ({"method": "hebb"}, r"method='hebb': allowed are 'bp', 'fa', 'dfa', 'sign_sym'"),
    "unknown start": ({"method": "fa", "fa_init_mode": "he"}, "fa_init_mode='he': allowed are 'gaussian'"),
    "negative k": ({"method": "fa", "fa_init_mode": "sparse", "fa_sparse_k": -1}, "fa_sparse_k=-1: must be"),
    "k is dense": ({"method": "fa", "fa_sparse_k": 2}, "fa_sparse_k=2: needs fa_init_mode='sparse'"),
    "no scale": ({"method": "fa", "feedback_std": 0.0}, "feedback_std=0.0: must be positive"),
    "nan scale": ({"method": "fa", "feedback_std": math.nan}, "feedback_std=nan: must be positive"),
    "scale of He": (
        {"method": "fa", "fa_init_mode": "ortho_he", "feedback_std": 0.1},
        "feedback_std=0.1: has no effect with fa_init_mode='ortho_he'",
    ),
    "negative seed": ({"method": "fa", "feedback_seed": -1}, "feedback_seed=-1: must be an integer"),
    "probes": ({"method": "fa", "fa_grape": True, "fa_grape_n_probe": 0}, "fa_grape_n_probe=0: must be an"),
    "probes only": ({"method": "fa", "fa_grape_n_probe": 8}, "fa_grape_n_probe=8: needs fa_grape=True"),
    "rate": ({"method": "fa", "fa_grape": True, "fa_grape_lr": 2.5}, r"fa_grape_lr=2.5: must be in \(0, 2\]"),
    "rate 0": ({"method": "fa", "fa_grape": True, "fa_grape_lr": 0.0}, r"fa_grape_lr=0.0: must be in \(0, 2"),
    "rate only": ({"method": "fa", "fa_grape_lr": 0.5}, "fa_grape_lr=0.5: needs fa_grape=True"),
    "head only": ({"method": "fa", "fa_grape_head": False}, "fa_grape_head=False: needs fa_grape=True"),
    "update": (
        {"method": "fa", "fa_grape": True, "fa_grape_update": "newton"},
        "fa_grape_update='newton': allowed are 'cosine', 'kaczmarz'",
    ),
    "update only": ({"method": "fa", "fa_grape_update": "kaczmarz"}, "fa_grape_update='kaczmarz': needs fa_"),
    "start": ({"method": "fa", "fa_grape": True, "fa_grape_start": -1}, "fa_grape_start=-1: must be an int"),
    "start only": ({"method": "fa", "fa_grape_start": 5}, "fa_grape_start=5: needs fa_grape=True"),
    "jvp": ({"method": "dfa", "jvp_update": "sgd"}, "jvp_update='sgd': allowed are 'grape', 'fdfa'"),
    "jvp only": ({"method": "dfa", "jvp_update": "fdfa"}, "jvp_update='fdfa': needs fa_grape=True"),
    "jvp rate": ({"method": "dfa", "fa_grape": True, "jvp_rate": 0.0}, r"jvp_rate=0.0: must be in \(0, 1\]"),
    "jvp share": (
        {"method": "dfa", "fa_grape": True, "jvp_share": 1.5},
        r"jvp_share=1.5: must be in \(0, 1\]",
    ),
    "jvp rate only": ({"method": "dfa", "jvp_rate": 0.5}, "jvp_rate=0.5: needs fa_grape=True"),
    "probes of dfa": (
        {"method": "dfa", "fa_grape": True, "fa_grape_n_probe": 8},
        "fa_grape_n_probe=8: has no effect with method='dfa'; needs method fa",
    ),
    "magnitude": ({"method": "sign_sym", "sign_magnitude": "one"}, "sign_magnitude='one': allowed are 'unif"),
    "uniform magnitudes have no seed": (
        {"method": "sign_sym", "feedback_seed": 1},
        "feedback_seed=1: has no effect with sign_magnitude='uniform'; needs 'random'",
    ),
    "scale": (
        {"method": "fa", "scale_follows": "W"},
        "scale_follows='W': allowed are 'start', 'weight', 'pr",
    ),
    "scale of GrAPE": (
        {"method": "fa", "fa_grape": True, "scale_follows": "weight"},
        "scale_follows='weight': has no effect with fa_grape=True, which brings the size along",
    ),
    "scale of a trained copy": (
        {"method": "kp", "scale_follows": "probes"},
        "scale_follows='probes': has no effect with method='kp'; needs method fa or sign_sym",
    ),
    "no scale to probe": (
        {"method": "fa", "scale_follows": "weight", "scale_n_probe": 8},
        "scale_n_probe=8: needs scale_follows='probes'",
    ),
    "probes of the scale": (
        {"method": "fa", "scale_follows": "probes", "scale_n_probe": 0},
        "scale_n_probe=0: must be an integer of at least 1",
    ),
    "a start of another scale": (
        {"method": "fa", "scale_follows": "weight", "feedback_std": 0.1},
        "feedback_std=0.1: is a scale: needs scale_follows='start'",
    ),
    "a start that is a scale": (
        {"method": "fa", "scale_follows": "probes", "fa_init_mode": "ortho_he"},
        "fa_init_mode='ortho_he': is a scale: needs scale_follows='start'",
    ),
    "mirror": ({"method": "wm", "mirror_n_probe": 0}, "mirror_n_probe=0: must be an integer of at least 1"),
    "mirror rate": ({"method": "wm", "mirror_rate": 1.5}, r"mirror_rate=1.5: must be in \(0, 1\]"),
}
OF_ANOTHER_RULE = {
    "fa_init_mode": "orthogonal",
    "feedback_std": 0.1,
    "feedback_seed": 3,
    "fa_grape": True,
    "fa_sparse_k": 2,
    "fa_grape_n_probe": 8,
    "fa_grape_lr": 0.5,
    "fa_grape_head": False,
    "fa_grape_update": "kaczmarz",
    "fa_grape_start": 2,
    "jvp_update": "fdfa",
    "jvp_rate": 0.5,
    "jvp_share": 1.0,
    "sign_magnitude": "random",
    "scale_follows": "weight",
    "scale_n_probe": 8,
    "mirror_n_probe": 8,
    "mirror_rate": 0.5,
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RuleOptions(**options)


def test_the_options_of_every_rule_are_tried():
    assert set().union(*(rule.uses for rule in RULES.values())) == set(OF_ANOTHER_RULE)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("field", OF_ANOTHER_RULE)
def test_an_option_that_the_rule_does_not_use_is_refused(field, method):
    options = {"method": method, field: OF_ANOTHER_RULE[field]}
    if field in RULES[method].uses:
        if field == "fa_sparse_k":
            options["fa_init_mode"] = "sparse"
        elif field.startswith(("fa_grape_", "jvp_")):
            options["fa_grape"] = True
        elif field == "feedback_seed" and "sign_magnitude" in RULES[method].uses:
            options["sign_magnitude"] = "random"
        elif field == "scale_n_probe":
            options["scale_follows"] = "probes"
        assert getattr(RuleOptions(**options), field) == OF_ANOTHER_RULE[field]
    else:
        with pytest.raises(ValueError, match=f"{field}=.* has no effect with method='{method}'; needs"):
            RuleOptions(**options)


# ------------------------------------------------------------ seeds


def test_seeds_depend_on_every_part_of_the_key():
    keys = [(), (1,), ("1",), (1, 2), (12,), (2, 1), ("a", "b"), ("ab",), ("a", 1), (1, "a")]
    assert len({seed_from(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_from(*key) < 2**63 for key in keys)
    assert seed_from(1, "probes", 0) == seed_from(1, "probes", 0) == 3457934695655093054


def test_generators_of_one_key_agree():
    draws = [torch.rand(3, generator=generator(*key)) for key in ((1, "a"), (1, "a"), (1, "b"))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_rule_is_imported_when_it_is_first_asked_for(monkeypatch):
    registry = Registry(late="localgpt_core.rules.kolen_pollack.KolenPollack", here=LearningRule)
    assert "late" in registry and [*registry] == ["late", "here"]
    assert registry.data["late"].endswith("KolenPollack")
    assert registry.summary("late") == "Kolen-Pollack: the feedback takes the same steps as the weight"
    assert registry.data["late"].endswith("KolenPollack")
    assert registry["late"] is registry.data["late"] is RULES["kp"]
    assert registry.summary("late").startswith("Kolen-Pollack: ")
    assert dict(registry.items()) == {"late": RULES["kp"], "here": LearningRule}
    with pytest.raises(KeyError):
        registry["none"]

"""The engine of the page "Train it here" computes what localgpt_core computes.

For each rule a small model, its weights moved off their initialisation, takes three steps in both, from the
same state, on the same batches and probes. Compared are losses, gradients, the state afterwards, and what the
page shows of the rule.
"""

import math

import pytest
import torch
from node import needs_node, play, unpacked

from localgpt_core import LocalGPT, LocalGPTConfig, TrainConfig, alignment
from localgpt_core.common.modes import exact_derivatives
from localgpt_core.common.seeds import generator
from localgpt_core.measure import feedback_cosines
from localgpt_core.training.step import build_optimizer, learning_rate, training_step

pytestmark = needs_node

RULES = {
    "bp": {"method": "bp"},
    "fa": {"method": "fa"},
    "sign_sym": {"method": "sign_sym"},
    "dfa": {"method": "dfa"},
    "kp": {"method": "kp"},
    "grape": {"method": "fa", "fa_grape": True},
}
SIZES = {
    "odd": {"vocab_size": 11, "block_size": 7, "n_layer": 3, "n_head": 3, "n_embd": 12},
    "tiny": {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32},
}
BATCH = {"odd": 3, "tiny": 8}
STEPS = 3
# Clipping acts, and the schedule is past its warm-up.
TRAIN = {"lr": 1e-2, "warmup": 1, "steps": 5, "grad_clip": 0.5}


def moved_model(config: LocalGPTConfig) -> LocalGPT:
    """Return a model in which attention, GELU and norms are far from their start."""
    model = LocalGPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            factor = 1 if parameter.ndim == 1 else 20 if "emb" in name else 8
            parameter.mul_(factor).add_(0.1 * torch.randn(parameter.shape) if parameter.ndim == 1 else 0)
        for name, buffer in model.named_buffers():
            if name.endswith("feedback_weight"):
                buffer.mul_(8)
    return model


def probes_of(model: LocalGPT, run: TrainConfig, step: int) -> list[torch.Tensor]:
    """Return what each layer of ``model`` draws before ``step``."""
    draws = []
    for place in model.feedback_places():
        source = generator(run.seed, "probes", step, place.place)
        draws.append(torch.randn(model.config.fa_grape_n_probe, place.in_features, generator=source))
    return draws


def exact_gradients(model: LocalGPT, batch: tuple) -> dict[str, torch.Tensor]:
    with exact_derivatives(model):
        grads = torch.autograd.grad(model(*batch)[1], list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


@pytest.fixture(scope="module", params=[(rule, size) for size in SIZES for rule in RULES], ids="-".join)
def both(request, tmp_path_factory):
    """What Python and what the engine make of the same run."""
    rule, size = request.param
    torch.manual_seed(3)
    config = LocalGPTConfig(**SIZES[size], **RULES[rule], dropout=0.0)
    run = TrainConfig(**TRAIN, batch_size=BATCH[size])
    model = moved_model(config)
    shape = (STEPS, 2, run.batch_size, config.block_size)
    batches = [tuple(pair) for pair in torch.randint(config.vocab_size, shape)]
    given = {
        "config": {**SIZES[size], "batch_size": run.batch_size},
        "rule": rule,
        "train": {**TRAIN, "min_lr_ratio": run.min_lr_ratio},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "batches": batches,
        "probes": [d for s in range(STEPS) for d in probes_of(model, run, s)] if rule == "grape" else [],
    }
    engine = play("steps.mjs", given, tmp_path_factory.mktemp("lab"))

    optimizer = build_optimizer(model, run)
    model.align_feedback(run.seed, "probes", 0, idx=batches[0][0])
    grads = torch.autograd.grad(model(*batches[0])[1], list(model.parameters()))
    state = model.state_dict()
    for name, tensor in given["state"].items():
        state[name].copy_(tensor)  # the feedback, as it was before it was aligned
    losses = [training_step(model, optimizer, run, *batch, s).item() for s, batch in enumerate(batches)]
    python = {
        "losses": losses,
        "gradients": dict(zip(dict(model.named_parameters()), grads, strict=True)),
        "start": given["state"],
        "state": model.state_dict(),
        "exact": exact_gradients(model, batches[0]),
        "model": model,
        "batch": batches[0],
    }
    return rule, python, engine


def distance(engine: dict, expected: torch.Tensor) -> float:
    """Return the distance to the expected tensor relative to its norm."""
    ours, theirs = unpacked(engine).double(), expected.detach().double().flatten()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def test_losses_are_the_same(both):
    _, python, engine = both
    assert engine["losses"] == pytest.approx(python["losses"], rel=1e-4)


@pytest.mark.parametrize("kind", ["gradients", "exact"])
def test_gradients_are_the_same(both, kind):
    _, python, engine = both
    assert engine[kind].keys() == python[kind].keys()
    apart = {name: distance(engine[kind][name], grad) for name, grad in python[kind].items()}
    # The exact gradient is one after three steps, in which rounding has grown.
    assert max(apart.values()) < (1e-4 if kind == "gradients" else 1e-3), apart


def test_steps_move_weights_and_feedback_alike(both):
    _, python, engine = both
    assert engine["state"].keys() == python["state"].keys()
    for name, after in python["state"].items():
        before = python["start"][name]
        ours = unpacked(engine["state"][name]).view(after.shape)
        # AdamW takes a whole step to either side where the gradient is nothing but rounding: not compared.
        grad = python["gradients"].get(name.replace("feedback_weight", "weight"), after)
        grad = grad if grad.shape == after.shape else after
        sure = grad.abs() >= 1e-5 * grad.abs().max()
        assert sure.float().mean() > 0.8, name
        step = (after - before)[sure].norm()
        assert (ours - after)[sure].norm() <= 2e-3 * step + 1e-6 * after.norm(), name


def test_feedback_moves_under_the_rules_that_move_it(both):
    rule, python, engine = both
    names = [name for name in engine["state"] if "feedback" in name]
    moved = [distance(engine["state"][name], python["start"][name]) > 1e-3 for name in names]
    assert set(moved) == {"bp": set()}.get(rule, {rule in ("kp", "grape")})


def test_what_the_page_shows_of_a_rule_is_what_python_measures(both):
    rule, python, engine = both
    model = python["model"]
    measured = feedback_cosines(model, python["batch"][0])
    shown = {entry["name"]: entry["degrees"] for entry in engine["angles"]}
    expected = {"bp": set(), "dfa": {"head"}}.get(rule, set(measured))
    assert shown.keys() == expected
    for name in shown.keys() if rule != "dfa" else ():
        assert shown[name] == pytest.approx(math.degrees(math.acos(min(1, measured[name]))), abs=0.1)
    found = alignment(model, *python["batch"])
    inside = [name for name in found.cosine if name.startswith("blocks") and ".ln" not in name]
    rule_norms = torch.tensor([found.norm_ratio[name] * found.exact_norm[name] for name in inside])
    exact_norms = torch.tensor([found.exact_norm[name] for name in inside])
    inner = (torch.tensor([found.cosine[name] for name in inside]) * rule_norms * exact_norms).sum()
    assert engine["cosine"] == pytest.approx(
        (inner / (rule_norms.norm() * exact_norms.norm())).item(), abs=2e-3
    )


def test_the_schedule_of_the_learning_rate_is_the_same(tmp_path):
    runs = [
        TrainConfig(lr=1e-3, warmup=w, steps=s, min_lr_ratio=m)
        for w, s, m in [(3, 9, 0.1), (0, 4, 1), (5, 5, 0)]
    ]
    fields = ("lr", "warmup", "steps", "min_lr_ratio")
    given = {"runs": [{name: getattr(run, name) for name in fields} for run in runs]}
    rates = play("schedule.mjs", given, tmp_path)["rates"]
    assert rates == [pytest.approx([learning_rate(step, run) for step in range(12)]) for run in runs]

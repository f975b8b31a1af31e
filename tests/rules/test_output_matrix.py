"""The control at feedback points: the head's weight times the last norm's gain, read in every step."""

import copy

import pytest
import torch
from cases import SIZES, make_batch, make_model, model_gradients
from torch.nn import functional

from localgpt_core import LocalGPT, LocalGPTConfig, TrainConfig, describe, weight_transport
from localgpt_core.layers.feedback_points import FeedbackPoint, ReadingPoint
from localgpt_core.measure.alignment import feedback_cosines
from localgpt_core.training.step import build_model, build_optimizer, training_step

HEAD = {"method": "dfa", "dfa_granularity": "block", "dfa_source": "head"}
TRAIN = TrainConfig(seed=4, steps=12, batch_size=2, warmup=0, lr=1e-2, precision="float64")


def points(model) -> dict[str, FeedbackPoint]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FeedbackPoint)}


@pytest.mark.parametrize("ln_mode", ["bp", "ste", "center_scale", "projected", "scale", "none"])
def test_every_point_reads_the_weight_times_the_gain(ln_mode):
    options = {**HEAD, "ln_mode": ln_mode, "dfa_granularity": "sublayer", "n_layer": 1 + (ln_mode != "none")}
    model = make_model(**options)
    inputs = torch.randn(3, 12, dtype=torch.float64)
    # The gain is by what the norm multiplies: without normalisation that is its own derivative.
    at_zero = model.ln_f(torch.zeros(12, dtype=torch.float64))
    z = inputs if ln_mode == "none" else functional.layer_norm(inputs, (12,))
    factor = (model.ln_f(inputs) - at_zero) / z
    expected = model.head.weight * factor[0]
    found = points(model)
    assert len(found) == 2 * model.config.n_layer
    for point in found.values():
        torch.testing.assert_close(point.matrix, expected, rtol=1e-9, atol=1e-12)
        assert point.buffer is None and not point.matrix.requires_grad
    assert not [name for name in model.state_dict() if "feedback" in name]


# ------------------------------------------------------------ limits that are backpropagation


@pytest.mark.parametrize(
    "options",
    [{"dfa_norm": True}, {"dfa_norm": True, "bias": True, "gated_blocks": True}, {"ln_mode": "none"}],
    ids=str,
)
def test_at_the_end_of_the_only_block_it_is_backpropagation(options):
    """J = W diag(gain) times the derivative of the normalisation, which the point brings, or which is 1."""
    model = make_model(**HEAD, **options, n_layer=1)
    exact = make_model(**{k: v for k, v in options.items() if k != "dfa_norm"}, n_layer=1)
    exact.load_state_dict(model.state_dict())
    found, expected = (model_gradients(m, *make_batch()) for m in (model, exact))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-14, msg=name)


def test_it_is_what_a_random_matrix_of_these_numbers_does():
    options = {**HEAD, "dfa_norm": True}
    model, twin = make_model(**options), make_model(**options | {"dfa_source": "random"})
    twin.load_state_dict(model.state_dict(), strict=False)
    twin.head.feedback_weight.copy_(model.head.weight.detach())
    for point in points(twin).values():
        point.feedback_weight.copy_((model.head.weight * model.ln_f.weight).detach())
    found, expected = (model_gradients(m, *make_batch()) for m in (model, twin))
    exact = model_gradients(make_model(), *make_batch())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(found["blocks.0.mlp.fc.weight"], exact["blocks.0.mlp.fc.weight"], rtol=1e-3)


# ------------------------------------------------------------ it is read in every step


def test_what_is_read_follows_the_weights_of_its_own_model():
    model = build_model(LocalGPTConfig(**SIZES, **HEAD), TRAIN)
    twin, optimizer = copy.deepcopy(model), build_optimizer(model, TRAIN)
    start = model.blocks[0].feedback.matrix.clone()
    for step in range(2):
        training_step(model, optimizer, TRAIN, *make_batch(), step)
    expected = (model.head.weight * model.ln_f.weight).detach()
    assert not torch.allclose(expected, start)
    for block, old in zip(model.blocks, twin.blocks, strict=True):
        assert torch.equal(block.feedback.matrix, expected) and torch.equal(old.feedback.matrix, start)
    with torch.device("meta"):
        bare = LocalGPT(LocalGPTConfig(**SIZES, **HEAD))
    bare.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(bare.to("cpu").blocks[1].feedback.matrix, expected)


def test_a_weight_that_was_read_is_found_out():
    for options in (HEAD, {**HEAD, "dfa_norm": True, "dfa_inside": "grape"}):
        model = make_model(**options)
        found = weight_transport(model, *make_batch())
        assert found["head"] == "weight"
        rows = {line.split()[0]: line for line in describe(model).splitlines()[1:]}
        for name in ("blocks.0.mlp.fc.weight", "blocks.1.attn.o_proj.weight", "tok_emb.weight"):
            assert rows[name].split()[1] == "output" and "W of head" in rows[name], rows[name]
        assert rows["ln_f.weight"].split()[1] == "exact"
    random = {line.split()[0]: line for line in describe(make_model(**AT_RANDOM)).splitlines()[1:]}
    assert not [line for name, line in random.items() if "W of head" in line]


AT_RANDOM = {**HEAD, "dfa_source": "random"}


def test_diagnostics_hold_it_against_the_mean_jacobian():
    model = make_model(**HEAD, ln_mode="none", n_layer=1)
    cosines = feedback_cosines(model, make_batch()[0])
    assert cosines == {"blocks.0.feedback": pytest.approx(1.0, abs=1e-12)}
    assert isinstance(model.blocks[0].feedback, ReadingPoint)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_model_has_the_same_gradients():
    model = make_model(**HEAD, dfa_norm=True)
    expected = model_gradients(model, *make_batch())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    model.zero_grad()
    compiled(*make_batch())[1].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)

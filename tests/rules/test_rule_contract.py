"""What every learning rule must hold: one contract over the registry, so that a new rule is tested too.

No rule is known here by its name: what a rule declares is asked of it and held against what it does. A file
of your own, my_rule.py, that enters its rule into `RULES` when it is imported, is tested where it lies:

    python -m pytest -p my_rule tests/rules/test_rule_contract.py -k NAME

What one rule costs, and how it moves its feedback, is worked out by hand in test_what_rules_declare.py.
"""

import copy
import dataclasses

import pytest
import torch
from cases import (
    MODEL_CASES,
    RULE_CASES,
    SIZES,
    T,
    make_batch,
    make_layer,
    make_model,
    model_gradients,
    normal,
)

from localgpt_core import RULES, LocalGPT, LocalGPTConfig, TrainConfig, weight_transport
from localgpt_core.common.seeds import generator
from localgpt_core.config import preset
from localgpt_core.measure.cost import alignment_flops, alignment_in_forward_passes, step_flops
from localgpt_core.rules import LearningRule
from localgpt_core.rules.feedback import HoldsFeedback
from localgpt_core.training.step import build_model, build_optimizer, learning_rate, training_step

TRAIN = TrainConfig(seed=4, steps=60, batch_size=8, warmup=5, lr=1e-2, precision="float64")


def accepted(options: dict) -> bool:
    try:
        LocalGPTConfig(**options)
    except ValueError:
        return False
    return True


# What a rule may take beside its name: probes of its feedback, the error coming in between blocks.
# The latter behind a norm: nothing else keeps the stream from growing, and some rules then learn nothing.
WAYS = {"grape": {"fa_grape": True}, "block": {"dfa_granularity": "block", "dfa_norm": True}}
CASES = RULE_CASES | {
    f"{name}-{way}": {"method": name, **options}
    for name in RULES
    for way, options in WAYS.items()
    if accepted({"method": name, **options})
}

every_rule = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def rule_of(options: dict) -> LearningRule:
    config = LocalGPTConfig(**options)
    return RULES[config.method](config.rule)


def draws_its_start(options: dict) -> bool:
    """Return whether the rule's buffer is drawn, so that another seed means another one."""
    rule, weight = rule_of(options), normal(5, 12)
    if rule.buffer_name is None:
        return False
    starts = [rule.initial_buffer(weight, 5, generator(seed)) for seed in (1, 2)]
    return not torch.equal(*starts)


def differ(a: dict, b: dict) -> set[str]:
    """Return the names whose tensors differ in any bit."""
    return {name for name in a if not torch.equal(a[name], b[name])}


def feedback(model) -> dict[str, HoldsFeedback]:
    """Return the places that have a buffer, by the name of that buffer."""
    places = {name: place for name, place in model.named_modules() if isinstance(place, HoldsFeedback)}
    return {f"{name}.{p.rule.buffer_name}": p for name, p in places.items() if p.rule.buffer_name}


def state(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def step(model, optimizer, at: int, rows: int = 8):
    idx, targets = make_batch(rows=rows, seed=at)
    return training_step(model, optimizer, TRAIN, idx, targets, at)


# ------------------------------------------------------------ declarations


@pytest.mark.parametrize("name", RULES)
def test_the_rule_declares_itself(name):
    rule = RULES[name]
    assert issubclass(rule, LearningRule) and rule.__doc__
    assert rule.error in ("local", "output")
    assert rule.transports in ("weight", "sign", "nothing")
    assert rule.uses <= set(LocalGPTConfig.__dataclass_fields__)
    layer = make_layer(method=name)
    assert list(dict(layer.named_buffers())) == ([rule.buffer_name] if rule.buffer_name else [])
    expected = (7 if rule.error == "output" else layer.out_features, layer.in_features)
    weight = None if rule.transports == "nothing" else layer.weight.detach()
    assert layer.rule.feedback(weight, layer.buffer).shape == expected


def test_the_base_class_has_no_feedback_of_its_own():
    rule = LearningRule(LocalGPTConfig())
    with pytest.raises(NotImplementedError, match="LearningRule must define its feedback"):
        rule.feedback(None, None)
    with pytest.raises(NotImplementedError, match="LearningRule declares no buffer"):
        rule.initial_buffer(torch.ones(2, 3), 2, torch.Generator())


# ------------------------------------------------------------ seeds and starts


@every_rule
def test_a_seed_determines_weights_feedback_and_gradients(options):
    models = [make_model(seed=1, **options) for _ in range(2)]
    other = make_model(seed=2, **options)
    assert not differ(*(state(model) for model in models))
    gradients = [model_gradients(model, *make_batch()) for model in models]
    assert not differ(*gradients)
    assert bool(feedback(other)) == (rule_of(options).buffer_name is not None)
    if draws_its_start(options):
        assert {*feedback(other)} <= differ(state(models[0]), state(other))


@every_rule
def test_initial_weights_do_not_depend_on_the_rule(options):
    weights = []
    for chosen in (options, {}):
        torch.manual_seed(11)
        weights.append(dict(LocalGPT(LocalGPTConfig(**SIZES, **chosen)).named_parameters()))
    assert weights[0].keys() == weights[1].keys()
    assert not differ(*weights)


@every_rule
def test_the_feedback_seed_changes_the_update_and_not_the_first_forward(options):
    if not draws_its_start(options):
        with pytest.raises(ValueError, match="feedback_seed=5: has no effect with (method|sign_magnitude)="):
            make_model(**options, feedback_seed=5)
        return
    models = [make_model(**options, feedback_seed=seed) for seed in (5, 6, 5)]
    idx, targets = make_batch()
    losses = [model(idx, targets)[1].item() for model in models]
    assert losses[0] == losses[1] == losses[2]
    gradients = [model_gradients(model, idx, targets) for model in models]
    assert not differ(gradients[0], gradients[2])
    # The head's weight is trained by the exact error of the logits.
    assert differ(gradients[0], gradients[1]) == {*gradients[0]} - {"head.weight"}


@every_rule
def test_layers_of_the_same_shape_get_different_feedback(options):
    places = [place.buffer for place in make_model(**options).feedback_places()]
    matrices = [buffer for buffer in places if buffer is not None and buffer.ndim == 2]
    if draws_its_start(options):
        assert len({tuple(buffer.flatten().tolist()) for buffer in matrices}) == len(matrices)


# ------------------------------------------------------------ which gradients flow


@pytest.mark.parametrize("model_case", MODEL_CASES)
@every_rule
def test_exactly_the_trained_parameters_get_a_gradient(options, model_case):
    model = make_model(**options, **MODEL_CASES[model_case])
    gradients = model_gradients(model, *make_batch(rows=3))
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert sorted(without) == sorted(model.untrained_parameters())
    silent = {name for name, gradient in gradients.items() if gradient is not None and not gradient.any()}
    # Softmax does not see a constant added to all scores of a query, so its keys' bias may come out as 0.
    assert all(name.endswith("k_proj.bias") for name in silent)
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


@every_rule
def test_the_rule_is_active_in_every_layer_below_the_head(options):
    idx, targets = make_batch()
    model = make_model(**options)
    gradients = model_gradients(model, idx, targets)
    exact = model_gradients(make_model(), idx, targets)
    changed = differ(gradients, exact)
    assert changed == (set() if rule_of(options).is_derivative else {*exact} - {"head.weight"})
    if rule_of(options).is_derivative:  # which torch takes: the rule itself must say the same
        for layer in model.local_linears():
            assert torch.equal(layer.rule.feedback(layer.matrix, layer.buffer), layer.matrix)


@every_rule
def test_the_backward_pass_reads_of_the_weight_what_is_declared(options):
    idx, targets = make_batch()

    def gradients(replace):
        model = make_model(**options)
        model.align_feedback("probes", 0, idx=idx)
        loss = model(idx, targets)[1]
        for index, layer in enumerate(model.local_linears()):
            layer.weight.data.copy_(replace(layer.weight.data, index))
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(lambda weight, index: weight)
    # The head's own gradient, g^T x, needs no feedback.
    readers = {*expected} - {"head.weight"}
    same_signs = gradients(lambda w, index: w * (0.1 + normal(*w.shape, seed=index).abs()))
    other_signs = gradients(lambda w, index: w * normal(*w.shape, seed=index).sign())
    config = LocalGPTConfig(**options)
    reads, granularity = RULES[config.inside_rule.method].transports, config.dfa_granularity
    if granularity != "layer" and reads != "nothing":
        # Between two feedback points the error passes the weights; in front of a point there are none.
        last = ("mlp.proj.weight", "o_proj.weight") if granularity == "sublayer" else ("mlp.proj.weight",)
        readers = {name for name in readers if not name.startswith("ln_f") and not name.endswith(last)}
    assert differ(expected, same_signs) == (readers if reads == "weight" else set())
    assert differ(expected, other_signs) == (set() if reads == "nothing" else readers)


@pytest.mark.parametrize("name", RULES)
def test_weight_transport_finds_what_is_declared(name):
    model = make_model(method=name)
    idx, targets = make_batch()
    model.align_feedback("probes", 0, idx=idx)
    assert set(weight_transport(model, idx, targets).values()) == {RULES[name].transports}


# ------------------------------------------------------------ how the feedback moves


@every_rule
def test_alignment_depends_on_its_key_only_and_moves_nothing_but_feedback(options):
    model = make_model(**options)
    before = state(model)
    random_state = torch.get_rng_state()
    twins = [copy.deepcopy(model) for _ in range(3)]
    for twin, key in zip(twins, (1, 1, 2), strict=True):
        twin.align_feedback("probes", key, idx=make_batch()[0])
    after = [state(twin) for twin in twins]
    assert torch.equal(torch.get_rng_state(), random_state)
    moves = {name for name, place in feedback(model).items() if place.rule.aligns != "no"}
    assert differ(before, after[0]) == moves
    assert not differ(after[0], after[1])
    # Either all of them draw something, or none does.
    assert differ(after[0], after[2]) in (set(), moves)


@every_rule
def test_a_step_moves_the_feedback_as_the_rule_says(options):
    model = make_model(**options)
    config = dataclasses.replace(TRAIN, weight_decay=0.0)
    before = state(model)
    idx, targets = make_batch(rows=8)
    training_step(model, build_optimizer(model, config), config, idx, targets, 0)
    after = state(model)
    for name, place in feedback(model).items():
        if place.rule.aligns != "no":
            continue  # it has moved before the step as well
        moved = after[name] - before[name]
        if place.learns:
            # The first step of AdamW is lr times the sign of the gradient, where that is not tiny.
            gradient, lr = dict(model.named_buffers())[name].grad, learning_rate(0, config)
            expected = -lr * gradient / (gradient.abs() + 1e-8)
        else:
            weight = f"{name.rpartition('.')[0]}.weight"
            expected = after[weight] - before[weight] if place.rule.mirrors_gradient else 0 * moved
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-14)


# ------------------------------------------------------------ training


def losses_on_a_toy_problem(options, **train):
    """Return the losses of 150 steps on "say the previous token", which only attention can solve."""
    config = TrainConfig(seed=4, steps=150, batch_size=16, warmup=5, lr=3e-2, precision="float64", **train)
    model = build_model(LocalGPTConfig(**SIZES, **options), config)
    optimizer = build_optimizer(model, config)
    losses = []
    for at in range(config.steps):
        idx, _ = make_batch(rows=16, seed=at)
        targets = torch.where(torch.arange(T) > 0, idx.roll(1, dims=1), idx)
        losses.append(training_step(model, optimizer, config, idx, targets, at).item())
    return losses


@pytest.fixture(scope="module")
def loss_of_a_frozen_body():
    return losses_on_a_toy_problem({}, freeze_body=True)[-1]


@every_rule
def test_the_loss_falls_on_a_toy_problem(options, loss_of_a_frozen_body):
    losses = losses_on_a_toy_problem(options)
    assert losses[0] == pytest.approx(torch.tensor(7.0).log().item(), abs=0.1)
    # Embeddings and head alone come down as well: the body must have learned something with them.
    assert 1.5 < loss_of_a_frozen_body < losses[0]
    learns, reason = losses[-1] < 0.75 * loss_of_a_frozen_body, rule_of(options).no_better_than_frozen
    assert isinstance(reason, str)
    if not reason:
        assert learns
    elif options.keys() == {"method"}:
        # A rule may say that it trains nothing: then in so many words, and it must be true.
        assert len(reason.split()) > 4
        assert not learns


@every_rule
def test_one_step_moves_every_parameter(options):
    model = make_model(**options)
    before = state(model)
    step(model, build_optimizer(model, TRAIN), 0)
    assert differ(before, state(model)) >= {name for name, _ in model.named_parameters()}


@every_rule
def test_frozen_parameters_stay(options):
    config = TrainConfig(seed=4, steps=60, freeze_body=True, precision="float64")
    model = build_model(LocalGPTConfig(**SIZES, **options), config)
    before = state(model)
    optimizer = build_optimizer(model, TRAIN)
    for at in range(2):
        step(model, optimizer, at)
    moved = differ(before, state(model)) - {*feedback(model)}
    assert moved == {"tok_emb.weight", "pos_emb.weight", "head.weight"}


@every_rule
def test_a_restored_state_takes_the_same_next_step(options):
    model = make_model(**options, dropout=0.1)
    optimizer = build_optimizer(model, TRAIN)
    for at in range(2):
        step(model, optimizer, at)
    twin = make_model(**options, dropout=0.1, seed=9)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    twin_optimizer = build_optimizer(twin, TRAIN)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = [step(model, optimizer, 2).item(), step(twin, twin_optimizer, 2).item()]
    assert losses[0] == losses[1]
    assert not differ(state(model), state(twin))


# ------------------------------------------------------------ cost


@every_rule
def test_a_step_multiplies_what_the_rule_declares(options):
    model, (idx, targets) = make_model(**options), make_batch()
    tokens, declared = idx.numel(), 0
    share_a_product = [layer for block in model.blocks for layer in (block.attn.k_proj, block.attn.v_proj)]
    for place in model.feedback_places():
        # An own product with the error, in the place of backpropagation's with the weight; a point has none.
        # Keys and values are sent the error of the output by the product that sends it to queries.
        width = place.tap_features or len(place.matrix)
        sends_all = type(place.rule).signal is LearningRule.signal
        if not (place.tap_features and sends_all and place in share_a_product):
            declared += place.rule.backward_flops(tokens, width, place.feedback_like.shape[-1])
            # Feedback that learns has a gradient of its own, error^T x: as large a product.
            declared += 2 * tokens * width * place.feedback_like.shape[-1] if place.learns else 0
        declared -= 0 if place.matrix is None else 2 * tokens * place.matrix.numel()
    assert step_flops(model, idx, targets) - step_flops(model, idx, targets, anchor=True) == declared


def follows_network(options: dict) -> bool:
    return rule_of(options).aligns == "network"


LAYERWISE = {case: options for case, options in CASES.items() if not follows_network(options)}


@pytest.mark.parametrize("options", LAYERWISE.values(), ids=LAYERWISE)
def test_moving_the_feedback_multiplies_what_the_rule_declares(options):
    model, (idx, _) = make_model(**options), make_batch()
    places = [place for place in model.feedback_places() if place.rule.aligns == "layer"]
    declared = sum(place.rule.align_flops(*place.matrix.shape, place.is_output) for place in places)
    assert alignment_flops(model, idx) == declared


@pytest.mark.parametrize("preset_name", ["cpu", "gpu"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in LAYERWISE])
def test_an_update_from_the_network_costs_at_most_one_and_a_half_forward_passes(case, preset_name):
    model_config, _ = preset(preset_name, CASES[case])
    idx = torch.zeros(2, model_config.block_size, dtype=torch.long)
    # On half of the sequences: values are a forward pass, tangents one from the first place that is disturbed
    # on; and then there are the products with the noise.
    assert 0.9 < alignment_in_forward_passes(LocalGPT(model_config), idx) < 1.5

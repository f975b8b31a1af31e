"""Weight transport, found out by experiment: what is declared, and rules that cheat."""

import pytest
import torch
from cases import RULE_CASES, make_batch, make_model

from localgpt_core import RULES, describe, weight_transport
from localgpt_core.layers.linear import LocalLinear
from localgpt_core.rules import LearningRule

CASES = ["bp", "fa", "kp", "wm", "fa-grape", "fa-kaczmarz", "dfa", "dfa-grape", "dfa-block-inside-grape"]
CASES += ["dfa-block-inside-kp"]
EXPECTED = dict.fromkeys(CASES, "nothing") | {"bp": "weight", "sign_sym": "sign", "sign_sym-random": "sign"}
# What the feedback takes of the weight before each step beside it: a size, where no probes estimate it.
EXPECTED |= {"fa-weight": "one number", "fa-probes": "nothing", "sign_sym-weight": "sign, one number"}
EXPECTED |= {"sign_sym-probes": "sign", "sign_sym-random-probes": "sign"}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_the_backward_pass_reads_is_what_is_declared(case):
    model = make_model(**RULE_CASES[case])
    idx, targets = make_batch()
    model.align_feedback("probes", 0, idx=idx)
    found = weight_transport(model, idx, targets)
    names = [name for name, module in model.named_modules() if isinstance(module, LocalLinear)]
    assert found == dict.fromkeys(names, EXPECTED[case])
    declared = RULES[RULE_CASES[case]["method"]].transports
    assert declared == (EXPECTED[case].removesuffix("one number").removesuffix(", ") or "nothing")


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_between_feedback_points_the_weights_are_read(granularity):
    model = make_model(method="dfa", dfa_granularity=granularity)
    found = weight_transport(model, *make_batch())
    assert found.pop("head") == "nothing"
    assert set(found.values()) == {"weight"}


@pytest.mark.parametrize("case", ["bp", "dfa-block-norm", "kp"])
def test_the_model_is_left_as_it_was(case):
    model = make_model(**RULE_CASES[case], dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    weight_transport(model, *make_batch())
    describe(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(module.training for module in model.modules())


# ------------------------------------------------------------ where nothing could show


@pytest.mark.parametrize("case", ["bp", "fa", "sign_sym"])
def test_a_layer_that_no_error_reaches_is_silent(case):
    model = make_model(**RULE_CASES[case], gated_blocks=True, gate_start=0.0)
    close_gates(model)
    found = weight_transport(model, *make_batch())
    assert found.pop("head") == EXPECTED[case]
    assert set(found.values()) == {"silent"}


def test_the_output_error_reaches_a_layer_behind_a_closed_gate():
    model = make_model(method="dfa", gated_blocks=True, gate_start=0.0)
    close_gates(model)
    assert set(weight_transport(model, *make_batch()).values()) == {"nothing"}


def close_gates(model):
    for block in model.blocks:
        block.alpha_attn.data.zero_()
        block.alpha_mlp.data.zero_()


@pytest.mark.parametrize("method", ["bp", "fa"])
def test_a_layer_below_which_nothing_is_trained_is_silent(method):
    # No trained norm and no trained embeddings: what q, k and v of the first block hand down trains nobody.
    model = make_model(method=method, freeze_emb=True)
    model.blocks[0].ln1.requires_grad_(False)
    found = weight_transport(model, *make_batch())
    lowest = {f"blocks.0.attn.{part}_proj" for part in "qkv"}
    assert {name for name, reads in found.items() if reads == "silent"} == lowest
    assert {found[name] for name in found.keys() - lowest} == {EXPECTED[method]}


@pytest.mark.parametrize("case", ["bp", "fa", "sign_sym"])
def test_a_weight_of_zeros_hides_nothing(case):
    model = make_model(**RULE_CASES[case])
    model.head.weight.data.zero_()
    found = weight_transport(model, *make_batch())
    assert found.pop("head") == EXPECTED[case]
    assert set(found.values()) == {EXPECTED[case] if case == "fa" else "silent"}
    assert (model.head.weight == 0).all()


def test_gradients_that_are_not_numbers_show_nothing():
    model = make_model()
    model.ln_f.weight.data.fill_(torch.nan)
    assert set(weight_transport(model, *make_batch()).values()) == {"silent"}


# ------------------------------------------------------------ cheats


class KeepsTheLayer(LearningRule):
    """Declares no transport, and reads the weight of the layer that it was told of."""

    layer = None

    def feedback(self, weight, buffer):
        return self.layer.weight.detach()


class ReadsItsBuffer(LearningRule):
    """Declares no transport, and reads a buffer into which the layer copies its weight."""

    buffer_name = "feedback_weight"

    def initial_buffer(self, weight, error_features, generator):
        return torch.zeros_like(weight)

    def feedback(self, weight, buffer):
        return buffer


class CopiesItsWeight(LocalLinear):
    def forward(self, x, taps=None):
        self.feedback_weight = self.weight.detach().clone()
        return super().forward(x, taps)


@pytest.fixture
def cheats(monkeypatch):
    monkeypatch.setitem(RULES, "keeps", KeepsTheLayer)
    monkeypatch.setitem(RULES, "reads", ReadsItsBuffer)


def test_a_rule_that_keeps_its_layer_is_caught(cheats):
    model = make_model(method="keeps")
    for layer in model.local_linears():
        layer.rule.layer = layer
    assert {layer.rule.transports for layer in model.local_linears()} == {"nothing"}
    assert set(weight_transport(model, *make_batch()).values()) == {"weight"}


def test_a_layer_that_copies_its_weight_in_the_forward_pass_is_caught(cheats):
    model = make_model(method="reads")
    honest = weight_transport(model, *make_batch())  # the buffer is 0: no error gets below the head
    assert honest.pop("head") == "nothing" and set(honest.values()) == {"silent"}
    for layer in model.local_linears():
        layer.__class__ = CopiesItsWeight
    assert set(weight_transport(model, *make_batch()).values()) == {"weight"}


def test_a_cheat_in_one_layer_is_found_in_that_layer(cheats):
    model = make_model(method="reads")
    # The head: what it hands down reaches the layers that write into the stream, whose feedback is 0.
    model.head.__class__ = CopiesItsWeight
    found = weight_transport(model, *make_batch())
    writers = {name for name in found if name.endswith(("o_proj", "mlp.proj"))}
    assert found.pop("head") == "weight"
    assert {name for name, reads in found.items() if reads == "nothing"} == writers
    assert {found[name] for name in found.keys() - writers} == {"silent"}


class TakesBeforeTheStep(LearningRule):
    """Declares no transport, and lets its feedback take something of the weight before each step."""

    buffer_name = "feedback_weight"
    aligns = "layer"
    take = None

    def initial_buffer(self, weight, error_features, generator):
        return torch.ones_like(weight)

    def feedback(self, weight, buffer):
        return buffer

    def align(self, weight, buffer, is_output, generator):
        type(self).take(weight, buffer)


TAKEN = {
    "weight": [
        lambda weight, buffer: buffer.copy_(weight),
        lambda weight, buffer: buffer.copy_(2 * weight.detach().clone()),
        lambda weight, buffer: buffer.mul_(weight.norm(dim=1, keepdim=True)),
        lambda weight, buffer: torch.add(buffer, weight, out=buffer),
        lambda weight, buffer: buffer.copy_(torch.tensor(weight.tolist())),
        lambda weight, buffer: buffer.fill_(float(torch.from_numpy(weight.numpy()).max())),
        lambda weight, buffer: buffer.copy_(torch.linalg.qr(weight.T).Q.T[:1]),
        lambda weight, buffer: buffer.copy_(torch.ones(1, len(weight)).to(weight) @ weight),  # backward
        lambda weight, buffer: buffer.copy_((weight.T @ torch.ones(len(weight)).to(weight))[None]),
        lambda weight, buffer: buffer.mul_((weight.abs() @ torch.ones(buffer.T.shape).to(weight))[:, :1]),
    ],
    "one number": [
        lambda weight, buffer: buffer.fill_(weight.abs().max()),
        lambda weight, buffer: buffer.fill_((weight.T**2 + 1).mean().item()),
        lambda weight, buffer: buffer.mul_(torch.linalg.matrix_norm(weight)),
        lambda weight, buffer: buffer.mul_((weight.T @ weight).diagonal().sum()),
    ],
    "2 numbers": [lambda weight, buffer: buffer.fill_(weight.min() + weight.max())],
    "sign": [
        lambda weight, buffer: buffer.copy_(weight.sign()),
        lambda weight, buffer: buffer.fill_(torch.sgn(weight).sum()),
    ],
    "sign, one number": [lambda weight, buffer: torch.mul(weight.sign(), weight.norm(), out=buffer)],
    "nothing": [
        lambda weight, buffer: buffer.fill_((weight @ torch.ones(weight.shape[1]).to(weight)).norm()),
        lambda weight, buffer: buffer.fill_((torch.ones_like(weight) @ weight.T).sum()),
        lambda weight, buffer: buffer.fill_(
            torch.nn.functional.linear(torch.ones_like(weight), weight).sum()
        ),
        lambda weight, buffer: buffer.mul_(weight.shape[0] * weight.numel()).add_(weight.ndim),
    ],
}


@pytest.mark.parametrize("taken, number", [(words, i) for words in TAKEN for i in range(len(TAKEN[words]))])
def test_what_the_feedback_takes_of_the_weight_before_a_step_is_noticed(monkeypatch, taken, number):
    monkeypatch.setitem(RULES, "takes", TakesBeforeTheStep)
    monkeypatch.setattr(TakesBeforeTheStep, "take", TAKEN[taken][number])
    model = make_model(method="takes")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(weight_transport(model, *make_batch()).values()) == {taken}
    *_, last = describe(model).splitlines()
    assert last == f"taken before each step: {taken} of W in 13 layers" or taken == "nothing"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------ describe


def rows(model) -> dict[str, list[str]]:
    """Return error and passed matrices of each parameter."""
    lines = [line.split(None, 2) for line in describe(model).splitlines()]
    assert lines[0] == ["parameter", "error", "has passed"]
    return {name: [error, *passed] for name, error, *passed in lines[1:]}


def test_every_parameter_has_a_row():
    model = make_model(method="fa", freeze_emb=True, ln_mode="ste", bias=True)
    table = rows(model)
    assert list(table) == [name for name, _ in model.named_parameters()]
    untrained = {name for name, row in table.items() if row[0] == "none"}
    assert untrained == set(model.untrained_parameters()) and "tok_emb.weight" in untrained
    assert all(len(table[name]) == 1 for name in untrained)


def test_direct_feedback_passes_one_matrix():
    table = rows(make_model(method="dfa"))
    assert table["head.weight"] == ["exact"]
    for i in range(2):
        for part in "qkv":
            row = table[f"blocks.{i}.attn.{part}_proj.weight"]
            assert row == ["output", f"B of blocks.{i}.attn.o_proj"]
        assert table[f"blocks.{i}.mlp.fc.weight"] == ["output", f"B of blocks.{i}.mlp.proj"]


def test_feedback_alignment_passes_every_matrix_above():
    table = rows(make_model(method="fa"))
    assert table["head.weight"] == ["exact"]
    assert table["blocks.1.mlp.proj.weight"] == ["local", "B of head"]
    assert table["blocks.1.mlp.fc.weight"] == ["local", "B of blocks.1.mlp.proj, B of head"]
    assert table["tok_emb.weight"][1].endswith(" and 11 more")


def test_backpropagation_passes_weights_and_sign_symmetry_signs():
    table = rows(make_model())
    assert {row[0] for row in table.values()} == {"exact"}
    assert table["blocks.1.mlp.proj.weight"] == ["exact", "W of head"]
    table = rows(make_model(method="sign_sym"))
    assert table["blocks.1.mlp.proj.weight"] == ["local", "sign W of head"]


def test_what_is_taken_before_a_step_stands_below_the_table():
    table = describe(make_model(method="sign_sym", scale_follows="weight")).splitlines()
    assert table[-1] == "taken before each step: one number of W in 13 layers"
    plain = describe(make_model(method="sign_sym")).splitlines()
    assert table[:-1] == plain and plain[-1].startswith("head.weight")


def test_between_points_the_error_passes_one_feedback_and_the_weights_of_its_block():
    table = rows(make_model(method="dfa", dfa_granularity="block"))
    assert table["blocks.0.mlp.proj.weight"] == ["output", "B of blocks.0.feedback"]
    assert table["blocks.0.mlp.fc.weight"] == ["output", "B of blocks.0.feedback, W of blocks.0.mlp.proj"]
    assert table["ln_f.weight"] == ["output", "B of head"]


def test_a_parameter_that_no_error_reaches_is_silent():
    model = make_model(gated_blocks=True)
    close_gates(model)
    table = rows(model)
    assert table["blocks.0.mlp.proj.weight"] == table["blocks.1.attn.q_proj.weight"] == ["silent"]
    assert table["head.weight"] == ["exact"] and table["tok_emb.weight"] == ["exact", "W of head"]
    assert table["blocks.0.alpha_mlp"][0] == "exact"  # the gate itself is trained


@pytest.mark.parametrize("method", ["bp", "fa"])
def test_a_parameter_whose_gradient_is_rounding_is_silent(method):
    # The same number added to all scores of a row: softmax does not depend on the bias of the keys.
    table = rows(make_model(method=method, attn_mode="softmax", bias=True))
    assert [name for name, row in table.items() if row[0] == "silent"] == [
        f"blocks.{i}.attn.k_proj.bias" for i in range(2)
    ]
    assert table["blocks.0.attn.k_proj.bias"] == ["silent"]

"""Weight transport, found out by experiment: what is declared, and rules that cheat."""

import pytest
import torch
from cases import RULE_CASES, make_batch, make_model

from localgpt_core import RULES, describe, weight_transport
from localgpt_core.linear import LocalLinear
from localgpt_core.rules import LearningRule

CASES = ["bp", "fa", "kp", "wm", "fa-grape", "fa-kaczmarz", "dfa", "dfa-grape", "dfa-block-inside-grape"]
CASES += ["dfa-block-inside-kp"]
EXPECTED = dict.fromkeys(CASES, "nothing") | {"bp": "weight", "sign_sym": "sign", "sign_sym-random": "sign"}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_the_backward_pass_reads_is_what_is_declared(case):
    model = make_model(**RULE_CASES[case])
    idx, targets = make_batch()
    model.align_feedback("probes", 0, idx=idx)
    found = weight_transport(model, idx, targets)
    names = [name for name, module in model.named_modules() if isinstance(module, LocalLinear)]
    assert found == dict.fromkeys(names, EXPECTED[case])
    assert EXPECTED[case] == RULES[RULE_CASES[case]["method"]].transports


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
    assert set(weight_transport(model, *make_batch()).values()) == {"nothing"}  # honest: the buffer is 0
    for layer in model.local_linears():
        layer.__class__ = CopiesItsWeight
    assert set(weight_transport(model, *make_batch()).values()) == {"weight"}


def test_a_cheat_in_one_layer_is_found_in_that_layer(cheats):
    model = make_model(method="reads")
    # The head: below it the honest feedback of zeros lets no error through that could tell.
    model.head.__class__ = CopiesItsWeight
    found = weight_transport(model, *make_batch())
    assert [name for name, reads in found.items() if reads != "nothing"] == ["head"]


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


def test_between_points_the_error_passes_one_feedback_and_the_weights_of_its_block():
    table = rows(make_model(method="dfa", dfa_granularity="block"))
    assert table["blocks.0.mlp.proj.weight"] == ["output", "B of blocks.0.feedback"]
    assert table["blocks.0.mlp.fc.weight"] == ["output", "B of blocks.0.feedback, W of blocks.0.mlp.proj"]
    assert table["ln_f.weight"] == ["output", "B of head"]

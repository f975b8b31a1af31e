"""torch.compile: one graph for every rule and option, with the gradients of the model itself."""

from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from cases import MODEL_CASES, RULE_CASES, make_batch, make_model
from torch._dynamo.testing import CompileCounterWithBackend
from toys import toy_corpus, toy_model, toy_train

from localgpt_core import LocalGPTConfig, train
from localgpt_core.bottlenecks import selection
from localgpt_core.common.modes import exact_derivatives
from localgpt_core.config import TrainConfig
from localgpt_core.experiments import execute
from localgpt_core.records.specs import RunSpec
from localgpt_core.training import RunState
from localgpt_core.training import state as run_state
from localgpt_core.training import step as steps
from localgpt_core.training.step import build_model, compiled, evaluate, precision

# Torch's own, when it looks into its autograd Functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

HEAD = {"method": "dfa", "dfa_granularity": "block", "dfa_norm": True, "dfa_source": "head"}
CASES = {f"rule-{name}": options for name, options in RULE_CASES.items()} | MODEL_CASES | {"dfa-head": HEAD}


@pytest.fixture
def graphs(monkeypatch):
    """Count the graphs, which are traced as for any compiler, forward and backward, and then run by torch."""
    torch.compiler.reset()
    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **given: compile_(model, backend=counter, **given))
    yield counter
    torch.compiler.reset()


def gradients(model, forward, config) -> dict[str, torch.Tensor]:
    torch.manual_seed(8)  # for dropout
    model.zero_grad(set_to_none=True)
    with precision(config, torch.device("cpu")):
        _, loss = forward(*make_batch(rows=3))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_one_graph_of_the_same_gradients(options, config, graphs):
    # One block is compiled in half the time of two; that of the first alone needs a second.
    layers = {} if "bottleneck_at" in options else {"n_layer": 1}
    model = make_model(torch.float32, **{**options, **layers})
    with exact_derivatives(model) if config.anchor_interval else nullcontext():
        expected, found = (gradients(model, f, config) for f in (model, compiled(model)))
    assert graphs.frame_count == 1
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        # Softmax does not see a constant added to all scores of a query.
        assert gradient.any() or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_option_is_one_graph_with_the_same_gradients(options, precision, graphs):
    dropout = {"dropout": 0.2} if precision == "float32" else {}
    config = TrainConfig(compile=True, precision=precision)
    assert_one_graph_of_the_same_gradients(options | dropout, config, graphs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", [case for case in MODEL_CASES if case.startswith(("mlp", "resid", "vq", "every"))]
)
def test_what_torch_does_itself_off_the_cpu_is_one_graph_with_the_same_gradients(
    case, precision, graphs, monkeypatch
):
    monkeypatch.setattr(selection, "_on_cpu", lambda x: False)
    config = TrainConfig(compile=True, precision=precision)
    assert_one_graph_of_the_same_gradients(CASES[case], config, graphs)


@pytest.mark.parametrize("case", ["rule-dfa-block-norm", "everything-sigmoid", "everything-softmax"])
def test_an_anchor_is_one_graph_with_the_same_gradients(case, graphs):
    config = TrainConfig(compile=True, anchor_interval=2)
    assert_one_graph_of_the_same_gradients(CASES[case], config, graphs)


def test_every_choice_of_every_option_is_among_them():
    seen = {(name, value) for options in CASES.values() for name, value in options.items()}
    choices = {
        (field.name, value)
        for field in fields(LocalGPTConfig)
        for value in field.metadata.get("choices") or ((True, False) if field.type in (bool, "bool") else ())
        if value != field.default
    }
    # Of the last two nothing is known in a step: they say what is done between two.
    assert choices - seen == {("vq_init", "kmeans"), ("fa_grape_head", False)}


# ------------------------------------------------------------ runs


@pytest.mark.parametrize(
    ("model", "changes", "number"),
    [
        ({"method": "fa", "fa_grape": True}, {}, 1 + 1),
        ({"method": "kp"}, {}, 1 + 1),
        ({"method": "dfa"}, {"anchor_interval": 3}, 2 + 1),
        ({"vq_codes": 5}, {"vq_start": 4}, 2 + 2),
        ({"dropout": 0.1}, {}, 2 + 1),  # with dropout, and once without to be compared
        # As many as there can be; torch allows 8.
        ({"method": "fa", "dropout": 0.1, "vq_codes": 5}, {"vq_start": 4, "anchor_interval": 3}, 5 + 2),
    ],
    ids=["probes", "mirror", "anchors", "late codes", "dropout", "all of it"],
)
def test_a_run_is_compiled_once_for_each_kind_of_step_and_of_evaluation(model, changes, number, graphs):
    config = toy_train(steps=10, eval_interval=2, compile=True, **changes)
    result = train(toy_model(**model), config, toy_corpus(), diagnose_every=5)
    assert result.status == "finished" and graphs.frame_count == number


def test_the_tenth_run_of_a_process_is_compiled_too(graphs, monkeypatch):
    monkeypatch.setattr(run_state, "evaluation", lambda *args: (1.0, 0.0))
    config = toy_train(steps=1, compile=True)
    for number in range(1, 11):
        train(toy_model(n_embd=8 * number), config, toy_corpus())
        assert graphs.frame_count == number


@pytest.mark.parametrize(  # windows of 7 characters: there are 28, and 4 characters that are left
    ("tokens", "precision"), [(7, "float64"), (21, "float32"), (56, "bfloat16"), (10**9, "float64")]
)
def test_evaluations_of_a_run_are_one_graph_and_the_number_of_the_model(
    tokens, precision, graphs, monkeypatch
):
    monkeypatch.setitem(steps.EVAL_TOKENS, "cpu", tokens)
    config = toy_train(compile=True, precision=precision)
    run = RunState(toy_model(method="fa", dropout=0.2), config, toy_corpus(), torch.device("cpu"))
    assert graphs.frame_count == 1
    ops, found = [graphs.op_count], []
    for _ in range(3):
        run.advance()
        found.append((run.evaluate(), evaluate(run.model, run.val, config)))
        assert graphs.frame_count == 3
        ops.append(graphs.op_count)
    assert ops[0] < ops[1] == ops[2] == ops[3]
    sizes = [node.meta.get("example_value") for graph in graphs.graphs for node in graph.graph.nodes]
    assert not any(isinstance(size, torch.SymInt) for size in sizes)  # each graph is of one shape
    for compiled_, eager in found:
        assert compiled_ == pytest.approx(eager, rel=1e-3 if precision == "bfloat16" else 1e-6)
    assert found[0] != found[1]


def test_an_evaluation_of_a_compiled_run_goes_through_the_compiled_model(monkeypatch):
    """All but what is left over: of 28 windows in batches of 8, 4 windows and 4 characters."""
    monkeypatch.setitem(steps.EVAL_TOKENS, "cpu", 8 * 7)
    shapes = {"compiled": [], "model": []}

    def noting(kind, model):
        model.register_forward_pre_hook(lambda _, args: shapes[kind].append((*args[0].shape,)))
        return model

    model = build_model(toy_model(), toy_train())
    stepped = noting("compiled", Passed(model))
    noting("model", model)
    evaluate(model, toy_corpus().val, toy_train(), stepped)
    assert shapes["compiled"] == 3 * [(8, 7)] and shapes["model"] == [*3 * [(8, 7)], (4, 7), (1, 4)]


class Passed(torch.nn.Module):
    """A compiled form, as far as an evaluation knows it: what calls the model."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args)


def test_what_cannot_be_one_graph_is_an_error(graphs):
    model = make_model(torch.float32)
    model.blocks[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(model)(*make_batch())


# ------------------------------------------------------------ the check before a run


class Wrong(torch.nn.Module):
    """A compiled model of another gradient: that of ``name`` times ``factor``."""

    def __init__(self, model, name: str, factor: float) -> None:
        super().__init__()
        self.model = model
        self.name, self.factor = name, factor

    def forward(self, *args):
        """Change the gradient on its way to the parameter, in this backward pass only."""
        parameter = self.model.get_parameter(self.name)
        logits, loss = self.model(*args)
        if loss.requires_grad:
            handle = parameter.register_hook(lambda gradient: handle.remove() or self.factor * gradient)
        return logits, loss

    def __getattr__(self, name: str):
        """Look up what else is asked of a compiled model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


@pytest.mark.parametrize("factor", [0.0, 0.9, -1.0, torch.nan])
def test_a_run_is_refused_where_the_compiler_has_other_gradients(factor, monkeypatch, tmp_path):
    name = "blocks.0.ln1.weight"
    monkeypatch.setattr(run_state, "compiled", lambda model, replayed: Wrong(model, name, factor))
    corpus = toy_corpus()
    spec = RunSpec(toy_model(), toy_train(compile=True), corpus.name, corpus.sha256)
    with pytest.raises(ValueError, match=rf"compile=True: gives {name} a gradient that is off by"):
        execute(spec, corpus, out=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_winners_in_half_precision_may_be_others(monkeypatch):
    monkeypatch.setattr(run_state, "compiled", lambda model, replayed: Wrong(model, "head.weight", 1.5))
    config = toy_train(compile=True, precision="bfloat16")
    RunState(toy_model(mlp_topk=9), config, toy_corpus(), torch.device("cpu"))
    with pytest.raises(ValueError, match="gives head.weight a gradient that is off by 0.5"):
        RunState(toy_model(), config, toy_corpus(), torch.device("cpu"))


def test_what_is_rounded_otherwise_is_accepted(monkeypatch):
    monkeypatch.setattr(run_state, "compiled", lambda model, replayed: Wrong(model, "head.weight", 1.01))
    run = RunState(toy_model(), toy_train(compile=True), toy_corpus(), torch.device("cpu"))
    assert all(parameter.grad is None for parameter in run.model.parameters())
    with pytest.raises(ValueError, match="off by 0.01 of its size, and may be by 1e-06"):
        config = toy_train(compile=True, precision="float64")
        RunState(toy_model(), config, toy_corpus(), torch.device("cpu"))

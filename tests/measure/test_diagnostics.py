"""Alignment over training and anchor steps: the run stays the same, and its record says what was measured."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from cases import make_batch, make_model, model_gradients
from toys import interrupt_after, toy_corpus, toy_model, toy_record, toy_spec, toy_train

from localgpt_core.config import TrainConfig
from localgpt_core.corpus.batches import windows
from localgpt_core.experiments.execution import execute
from localgpt_core.experiments.scheduler import missing_runs
from localgpt_core.experiments.suites import Arm, PlannedRun, read_suite
from localgpt_core.measure import inside as internals
from localgpt_core.measure.alignment import alignment, feedback_cosines
from localgpt_core.measure.diagnostics import Diagnostics, measure_into
from localgpt_core.records import (
    RunRecord,
    export_bundle,
    import_bundle,
    load_records,
    read_record,
)
from localgpt_core.training.loop import train
from localgpt_core.training.state import RunState
from localgpt_core.training.step import build_model, build_optimizer, is_anchor, training_step

BOOK = Path(__file__).parents[2] / "book"
RUNS = {
    "fa-grape": {"method": "fa", "fa_grape": True, "dropout": 0.2},
    "dfa-grape": {"method": "dfa", "fa_grape": True, "dropout": 0.2},
    "kp": {"method": "kp", "dropout": 0.2},
    "dfa-block": {"method": "dfa", "dfa_granularity": "block", "dropout": 0.2},
}


# ------------------------------------------------------------ the run stays the same


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_diagnostics_change_no_bit_of_a_run(options):
    config = toy_train(lr=1e-2, steps=16)
    plain = train(toy_model(**options), config, toy_corpus())
    measured = train(toy_model(**options), config, toy_corpus(), diagnose_every=7)
    assert measured.curves == plain.curves
    state = measured.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.model.state_dict().items())
    assert plain.diagnostics == {} and measured.diagnostics["step"] == [0, 7, 14, 16]


def test_what_is_measured_is_the_alignment_at_that_step():
    config = toy_train(lr=1e-2, steps=8)
    model_config = toy_model(method="fa", dropout=0.2)
    found = train(model_config, config, toy_corpus(), diagnose_every=4).diagnostics
    run = RunState(model_config, config, toy_corpus(), torch.device("cpu"))
    for _ in range(4):
        run.advance()
    idx, targets = run.batch(4)
    expected = alignment(run.model, idx, targets, seed=4)
    assert found["step"] == [0, 4, 8]
    assert found["total_cosine"][1] == pytest.approx(expected.total_cosine, rel=1e-3)
    assert found["descends"][1] == float(expected.descends)
    matrices = {name for name, parameter in run.model.named_parameters() if parameter.ndim == 2}
    assert found["cosine"].keys() == found["norm_ratio"].keys() == matrices
    for name in matrices:
        assert found["cosine"][name][1] == pytest.approx(expected.cosine[name], rel=1e-3)
        assert found["norm_ratio"][name][1] == pytest.approx(expected.norm_ratio[name], rel=1e-3)
    for name in ("residual_rms", "rule_rms", "exact_rms"):
        assert found[name][1] == pytest.approx(getattr(expected, name), rel=1e-3)
    cosines = feedback_cosines(run.model, idx)
    assert found["feedback"].keys() == cosines.keys()
    assert found["feedback"]["head"][1] == pytest.approx(cosines["head"], rel=1e-3)
    lists = [values for table in ("cosine", "norm_ratio", "feedback") for values in found[table].values()]
    assert {len(values) for values in lists} == {3}


def test_what_goes_on_inside_is_measured_at_that_step():
    options = {"mlp_topk": 5, "vq_codes": 6, "gated_blocks": True}
    run = RunState(toy_model(**options), toy_train(steps=4, lr=1e-2), toy_corpus(), torch.device("cpu"), 2)
    run.diagnose()
    run.advance()
    run.advance()
    run.diagnose()
    text = windows(toy_corpus().val, 7)[0][:128]
    counts = internals.choices(run.model, text)
    expected = {
        "radial": internals.radial_shares(run.model, *run.batch(2)),
        "vq_radial": internals.code_radial_shares(run.model, *run.batch(2)),
        "gates": internals.gates(run.model),
        "unused": {place: internals.unused_share(found) for place, found in counts.items()},
        "entropy": {place: internals.entropy_bits(found) for place, found in counts.items()},
    }
    assert list(counts) == ["blocks.0.mlp", "blocks.0.vq"] and "concentration" not in run.diagnostics
    for quantity, values in expected.items():
        found = run.diagnostics[quantity]
        assert {place: series[1] for place, series in found.items()} == pytest.approx(values, rel=1e-3)
        assert all(len(series) == 2 for series in found.values())


def test_concentration_is_measured_where_no_unit_is_silenced():
    run = RunState(toy_model(), toy_train(), toy_corpus(), torch.device("cpu"), 5)
    run.diagnose()
    text = windows(toy_corpus().val, 7)[0][:128]
    (found,) = run.diagnostics["concentration"]["blocks.0"]
    assert found == pytest.approx(internals.concentration(run.model, text)["blocks.0"], rel=1e-3)
    assert run.diagnostics["unused"] == run.diagnostics["entropy"] == run.diagnostics["gates"] == {}


@pytest.mark.parametrize("stop", [3, 7, 12])
def test_a_resumed_run_has_the_diagnostics_of_an_uninterrupted_one(monkeypatch, tmp_path, stop):
    model, config, path = toy_model(**RUNS["fa-grape"]), toy_train(steps=14, lr=1e-2), tmp_path / "c"
    whole = train(model, config, toy_corpus(), diagnose_every=7)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        first = train(model, config, toy_corpus(), checkpoint=path, diagnose_every=7)
    assert first.status == "interrupted"
    result = train(model, config, toy_corpus(), checkpoint=path, resume=True, diagnose_every=7)
    assert result.diagnostics == whole.diagnostics and result.curves == whole.curves


def four_digits(values: dict[str, float]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.4g}")] for name, value in values.items()}


def test_what_is_measured_has_its_names_four_digits_and_the_draws_of_its_step():
    model, (idx, targets), (text, _) = make_model(method="dfa"), make_batch(), make_batch(rows=9, seed=6)
    found: Diagnostics = {}
    measure_into(found, model, idx, targets, text, 3)
    expected = alignment(model, idx, targets, seed=3)
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    assert found == {
        "step": [3],
        "total_cosine": [float(f"{expected.total_cosine:.4g}")],
        "descends": [float(expected.descends)],
        **{
            name: [[float(f"{value:.4g}") for value in getattr(expected, name)]]
            for name in ("residual_rms", "rule_rms", "exact_rms")
        },
        "cosine": four_digits({name: expected.cosine[name] for name in matrices}),
        "norm_ratio": four_digits({name: expected.norm_ratio[name] for name in matrices}),
        "feedback": four_digits(feedback_cosines(model, idx, seed=3)),
        "radial": four_digits(internals.radial_shares(model, idx, targets)),
        "concentration": four_digits(internals.concentration(model, text)),
        "gates": {},
        "unused": {},
        "entropy": {},
    }
    assert found["feedback"] != four_digits(feedback_cosines(model, idx, seed=0))


def test_a_number_that_says_nothing_is_none_in_every_place():
    model, (idx, targets) = make_model(method="fa"), make_batch()
    model.head.feedback_weight.zero_()
    found: Diagnostics = {}
    measure_into(found, model, idx, targets, idx, 0)
    assert found["cosine"].pop("head.weight") == [1.0]
    assert len(found["cosine"]) == 14 and all(values == [None] for values in found["cosine"].values())
    assert found["feedback"].pop("head") == [None] and None not in found["feedback"].values()


def test_the_interval_is_checked():
    with pytest.raises(ValueError, match="diagnose_every=-1: must be an integer of at least 0"):
        train(toy_model(), toy_train(), toy_corpus(), diagnose_every=-1)


# ------------------------------------------------------------ records


def test_diagnostics_survive_their_record(tmp_path):
    spec = dataclasses.replace(toy_spec(method="fa"), train=toy_train(steps=6))
    record, result = execute(spec, toy_corpus(), diagnose_every=3)
    again = read_record(record.write(tmp_path))
    assert again.diagnostics == result.diagnostics == record.diagnostics
    assert again.diagnostics["step"] == [0, 3, 6] and again.anchor_steps == 0
    assert again.to_json() == record.to_json()


def test_a_cosine_that_says_nothing_is_null_in_a_record():
    spec = toy_spec(method="fa", n_layer=1)
    diagnostics = {"step": [0], "cosine": {"a": [None]}, "total_cosine": [math.nan]}
    record = RunRecord.from_json(toy_record(spec, diagnostics=diagnostics).to_json())
    assert record.diagnostics == {"step": [0], "cosine": {"a": [None]}, "total_cosine": [None]}


def test_an_old_record_without_the_new_fields_is_read(tmp_path):
    path = next(iter(sorted((BOOK / "records" / "baseline").glob("*.json"))))
    values = json.loads(path.read_text())
    for name in ("anchor_steps", "diagnostics"):
        values.pop(name, None)
    (tmp_path / path.name).write_text(json.dumps(values))
    record = read_record(tmp_path / path.name)
    assert (record.anchor_steps, record.diagnostics) == (0, {})
    assert record.digest == path.stem


WITH = {"diagnostics": {"step": [0, 10, 20]}}


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
def test_a_record_with_diagnostics_goes_before_one_without(tmp_path, first, second):
    toy_record().write(tmp_path / first)
    toy_record(**WITH).write(tmp_path / second)
    assert load_records(tmp_path)[toy_spec().digest].diagnostics == WITH["diagnostics"]


def test_an_import_brings_diagnostics_and_takes_none_away(tmp_path):
    bundle, root = tmp_path / "b.jsonl", tmp_path / "records"
    toy_record().write(root / "toys")
    toy_record(toy_spec(2), **WITH).write(root / "toys")
    export_bundle([toy_record(**WITH), toy_record(toy_spec(2))], bundle)
    assert [path.stem for path in import_bundle(bundle, root)] == [toy_spec().digest]
    assert {record.seed: record.diagnostics for record in load_records(root).values()} == {
        1: WITH["diagnostics"],
        2: WITH["diagnostics"],
    }


# ------------------------------------------------------------ suites

SUITE = """
question = "Which?"
preset = "tiny"
seeds = [1]
corpus = "toy"
diagnose_every = 50
[arms.a]
[arms.b]
diagnose_every = 0
[arms.c]
diagnose_every = 7
"""


def test_an_arm_has_its_own_interval_or_the_suites(tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text(SUITE)
    assert [arm.diagnose_every for arm in read_suite(path).arms] == [50, 0, 7]
    path.write_text(SUITE.replace("diagnose_every = 50\n", ""))
    assert [arm.diagnose_every for arm in read_suite(path).arms] == [0, 0, 7]
    for value, shown in (("-1", "-1"), ("2.5", "2.5"), ("true", "True"), ('"x"', "'x'")):
        path.write_text(SUITE.replace("diagnose_every = 7", f"diagnose_every = {value}"))
        with pytest.raises(ValueError, match=f"diagnose_every={shown}: must be an integer of at least 0"):
            read_suite(path)


def planned(every: int) -> PlannedRun:
    return PlannedRun(Arm("a", "a", {}, {}, (1,), every), toy_spec())  # 20 steps


@pytest.mark.parametrize(
    ("every", "steps", "status", "missing"),
    [
        (0, None, "finished", False),
        (10, None, "finished", True),
        (10, [0, 10, 20], "finished", False),
        (20, [0, 10, 20], "finished", False),
        (5, [0, 10, 20], "finished", True),
        (7, [0, 7, 14, 20], "finished", False),
        (10, None, "diverged", True),
        (10, [0], "diverged", False),
        (5, [0, 10], "diverged", False),
        (0, [0, 10, 20], "failed", True),
    ],
)
def test_a_run_is_repeated_until_it_has_what_is_asked(every, steps, status, missing):
    run = planned(every)
    record = toy_record(status=status, diagnostics={"step": steps} if steps else {})
    assert missing_runs([run], {record.digest: record}) == ([run] if missing else [])


@pytest.mark.parametrize("lr", [1e30, 1e6])
def test_a_diverging_run_with_diagnostics_is_not_repeated(lr):
    spec = dataclasses.replace(toy_spec(method="fa"), train=toy_train(lr=lr))
    record, _ = execute(spec, toy_corpus(), diagnose_every=5)
    assert record.status == "diverged"
    record = RunRecord.from_json(record.to_json())
    assert missing_runs([PlannedRun(planned(5).arm, spec)], {record.digest: record}) == []


# ------------------------------------------------------------ anchors


@pytest.mark.parametrize("options", [*RUNS.values(), {"method": "sign_sym"}, {"vq_codes": 5}], ids=str)
def test_an_anchor_step_has_the_gradients_of_backpropagation(options):
    # A codebook's own exact derivative is measured in test_alignment.py; here the twin shares it.
    options = {**options, "dropout": 0.0}
    config = TrainConfig(seed=1, steps=4, anchor_interval=2, grad_clip=0.0, precision="float64")
    model, exact = make_model(**options), make_model(vq_codes=options.get("vq_codes", 0))
    idx, targets = make_batch()
    for step in (0, 1):
        exact.load_state_dict(model.state_dict(), strict=False)
        optimizer = build_optimizer(model, config)
        training_step(model, optimizer, config, idx, targets, step)
        expected = model_gradients(exact, idx, targets)
        same = {n for n, p in model.named_parameters() if torch.allclose(p.grad, expected[n], rtol=1e-9)}
        if step == 1 and "vq_codes" not in options:
            assert same == {*expected}
        elif step == 0 and "method" in options:
            assert same == {"head.weight"}
        assert not any("exact" in vars(module) for module in model.modules())


def test_every_so_many_steps_one_is_an_anchor():
    config = TrainConfig(anchor_interval=3)
    assert [step for step in range(10) if is_anchor(step, config)] == [2, 5, 8]
    assert not any(is_anchor(step, TrainConfig()) for step in range(10))


@pytest.mark.parametrize(("interval", "count"), [(0, 0), (1, 20), (3, 6), (7, 2), (20, 1)])
def test_anchor_steps_are_counted_and_paid_for(monkeypatch, interval, count):
    taken, model = [], toy_model(method="dfa")
    config = toy_train(anchor_interval=interval)
    spec = dataclasses.replace(toy_spec(method="dfa"), train=config)
    original = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: taken.append(1) or original(*a, **k))
    record, result = execute(spec, toy_corpus())
    assert record.anchor_steps == result.anchor_steps == count
    dfa = RunState(model, toy_train(), toy_corpus(), torch.device("cpu")).flops_per_token
    exact = RunState(toy_model(), toy_train(), toy_corpus(), torch.device("cpu")).flops_per_token
    assert dfa != exact
    share = count / 20
    assert record.flops_per_token == pytest.approx((1 - share) * dfa + share * exact, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"ln_mode": "projected"}, {"mlp_topk": 3}, {"bias": True}], ids=str)
def test_anchors_of_an_exact_model_are_refused(options):
    with pytest.raises(ValueError, match="anchor_interval=5: has no effect where every derivative is exact"):
        build_model(toy_model(**options), toy_train(anchor_interval=5))


@pytest.mark.parametrize("options", [{"ste_gelu": True}, {"vq_codes": 4}, {"ln_mode": "ste"}], ids=str)
def test_anchors_of_a_model_with_a_surrogate_are_accepted(options):
    result = train(toy_model(**options), toy_train(steps=3, anchor_interval=2), toy_corpus())
    assert (result.status, result.anchor_steps) == ("finished", 1)

"""Whatever a record says is held to something: by reading, by a repetition, or it is known to be free."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from toys import toy_corpus, toy_record, toy_spec, toy_train

from localgpt_core.corpus import load_corpus
from localgpt_core.corpus.recall import HOPS
from localgpt_core.experiments.execution import execute
from localgpt_core.experiments.verification import FREE, diagnose_every, judge
from localgpt_core.records import RunRecord, load_records
from localgpt_core.training.state import RunState

RECORDS = Path(__file__).parents[2] / "book" / "records"
SPEC = dataclasses.replace(toy_spec(), train=toy_train(eval_interval=20))  # evaluations at steps 0 and 20
ELSEWHERE = {"environment": {**toy_record().environment, "device": "elsewhere"}}


def measured(losses, status="finished", steps=(0, 20), **changes):
    """Return a record with these validation losses."""
    curves = {**toy_record(SPEC).curves, "val_step": list(steps), "val_loss": losses}
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    ends = {"final_val_loss": losses[-1] if status == "finished" else None, "best_val_loss": None}
    if finite:
        ends["best_val_loss"] = min(finite)
    return toy_record(SPEC, status=status, **ends, **{"curves": curves, **changes})


# Every field of a record


@pytest.fixture(scope="module")
def made():
    """A run with everything that a record can have, and the same run made again."""
    model = {"method": "fa", "n_layer": 2, "gated_blocks": True, "vq_codes": 5}
    train = toy_train(steps=9, eval_interval=3, anchor_interval=4)
    spec = dataclasses.replace(toy_spec(**model), train=train)
    both = (
        execute(spec, toy_corpus(), suite="s", arm="a", preset="tiny", diagnose_every=3) for _ in range(2)
    )
    recorded, again = (RunRecord.from_json(record.to_json()) for record, _ in both)
    assert judge(recorded, again, 0.0).agrees
    return recorded, again


def paths(value, at=()):
    """Yield the path of every leaf of a record's JSON."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if not items:
        yield at
        return
    for key, item in items:
        yield from paths(item, (*at, key))


def values_beside(value):
    """Return other values that a hand could write in the place of ``value``, the nearest ones first."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value + 3]
    if isinstance(value, float):
        return [value + 1e-3 * (abs(value) or 1), value - 1e-3 * (abs(value) or 1), None]
    return [1.5] if value is None else [value + "x"] if isinstance(value, str) else [{"x": 1}]


def changed_at(values, path, value):
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def notice(values, again):
    """Return who notices: reading or a repetition, empty if nobody does."""
    try:
        record = RunRecord.from_json(json.dumps(values))
    except ValueError:
        return "reading"
    verdict = judge(record, again, 0.02)
    return "" if verdict.agrees and verdict.text == judge(again, again, 0.02).text else "verify"


def test_whatever_is_changed_in_a_record_is_noticed_or_known_to_be_free(made):
    recorded, again = made
    values = json.loads(recorded.to_json())
    del values["sha256"]  # which would notice everything
    assert values.keys() == {item.name for item in dataclasses.fields(RunRecord)}
    leaves = list(paths(values))
    assert {path[0] for path in leaves} == values.keys()  # a new field is asked for here
    unnoticed = set()
    for path in leaves:
        value = values
        for key in path:
            value = value[key]
        for other in values_beside(value):
            if not notice(changed_at(values, path, other), again):
                unnoticed.add(".".join(map(str, path)))
    assert unnoticed == FREE.keys() - {"error"}  # as an error beside a sample is refused


def test_what_is_left_out_of_or_added_to_a_part_of_a_record_is_noticed(made):
    recorded, again = made
    values = json.loads(recorded.to_json())
    del values["sha256"]
    parts = [(key,) for key in ("spec", "curves", "diagnostics", "parameters", "environment")]
    parts += [("diagnostics", key) for key, value in values["diagnostics"].items() if value]
    parts += [("curves", key) for key in values["curves"]]
    for part in parts:
        whole = values
        for key in part:
            whole = whole[key]
        for key in whole if isinstance(whole, dict) else [0]:
            fewer = copy.deepcopy(whole)
            del fewer[key]
            noticed = notice(changed_at(values, part, fewer), again)
            free = f"environment.{key}" in FREE or key == "device_type"
            # Older records have fewer quantities, and nobody can show one that is not there.
            assert noticed or free or (part == ("diagnostics",) and key != "step"), (*part, key)


def test_every_free_field_says_why():
    names = {item.name for item in dataclasses.fields(RunRecord)}
    assert all(name.partition(".")[0] in names and len(why) > 5 for name, why in FREE.items())


def diagnosed(**quantities):
    return {"diagnostics": {"step": [0], **quantities}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_val_loss": 2.4}, r"final_val_loss=2.4: the last of its curve is 2.5"),
        ({"final_val_loss": None}, r"final_val_loss=None: the last of its curve is 2.5"),
        ({"best_val_loss": 2.5}, r"best_val_loss=2.5: the lowest of its curve is 2.25"),
        ({"anchor_steps": 1}, r"anchor_steps=1: what its spec makes is 0"),
        ({"tokens_per_s": 30.0}, r"tokens_per_s=30.0: 420 tokens then take 14 s of 12 s"),
        ({"wall_time_s": 0.4}, r"tokens_per_s=1000.0: 420 tokens then take 0.42 s of 0.4 s"),
        ({"wall_time_s": -1.0}, r"wall_time_s=-1.0: must be finite and not negative"),
        ({"tokens_per_s": None}, r"tokens_per_s=None: must be positive"),
        ({"flops_per_token": None}, r"flops_per_token=None: must be positive"),
        ({"parameters": {"total": 5, "trained": 6}}, r"parameters.trained=6: .* at most 5"),
        ({"parameters": {}}, r"parameters=\{\}: must be total and trained"),
        ({"status": "diverged"}, r"final_val_loss=2.5: that of a diverged run is None"),
        ({"status": "diverged", "final_val_loss": None}, r"status='diverged': the last loss alone"),
        ({"status": "failed"}, r"final_val_loss=2.5: a failed run has none"),
        ({"error": "no sample: KeyError"}, r"error=.*: says why there is no sample"),
        ({"environment": {"device_type": "tpu"}}, r"environment.device_type='tpu': allowed are"),
        ({"diagnostics": {"cosine": {}}}, r"diagnostics.step=None: must be a list of steps"),
        ({"diagnostics": {"step": [0, 21]}}, r"diagnostics.step=21: .* at most 20"),
        (diagnosed(cosine={"a": [0.1, 0.2]}), r"diagnostics.cosine.a=.*: 2 values for 1"),
        (diagnosed(cosine={"a": [1.5]}), r"diagnostics.cosine.a=1.5: must be in \[-1, 1\]"),
        (diagnosed(descends=[1.0], total_cosine=[-0.5]), r"diagnostics.descends=1.0"),
    ],
    ids=str,
)
def test_a_record_that_says_two_things_is_refused_by_name(change, message):
    values = {**json.loads(toy_record(SPEC).to_json()), **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        RunRecord.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("curve", "values", "message"),
    [
        ("step", [10, 19], r"curves.tokens=.*of these steps it is \[210, 399\]"),
        ("step", [20, 20], r"curves.step=20: must be an integer of at least 21"),
        ("step", [10, 30], r"curves.step=30: .* at most 20"),
        ("step", [10], r"curves.tokens=.*: 2 values for 1 steps"),
        ("tokens", [210, 421], r"curves.tokens=.*of these steps it is"),
        ("lr", [1e-3, 1e-4], r"curves.lr=0.001: at step 10 its spec has"),
        ("val_step", [0, 10], r"curves.val_step=\[0, 10\]: of its spec it is \[0, 20\]"),
        ("val_step", [], r"curves.val_loss=.*: 2 values for 0 steps"),
        ("val_loss", [2.25, None], r"status='finished': but not finite are \[\('val_loss', 20\)\]"),
        ("train_loss", [None, 2.5], r"status='finished': but not finite are \[\('train_loss', 10\)\]"),
        ("extra", [1], r"curves=.*: must be step, tokens, lr"),
    ],
)
def test_curves_that_contradict_the_spec_are_refused(curve, values, message):
    record = toy_record(SPEC)
    with pytest.raises(ValueError, match=f"^{message}"):
        RunRecord.from_json(dataclasses.replace(record, curves={**record.curves, curve: values}).to_json())


def test_a_finished_run_ends_at_its_last_step():
    curves = {name: values[:1] for name, values in toy_record(SPEC).curves.items()}
    record = dataclasses.replace(toy_record(SPEC), curves=curves, final_val_loss=2.25, tokens_per_s=100.0)
    with pytest.raises(ValueError, match=r"status='finished': has 20 steps; its curves end at \[10, 0\]"):
        RunRecord.from_json(record.to_json())


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({}, {"steps": 1, "eval_interval": 50}),
        ({}, {"lr": 1e6}),
        ({"method": "fa"}, {"lr": 1e30, "anchor_interval": 3}),
        ({"vq_codes": 5, "vq_init": "kmeans"}, {"vq_start": 7}),
        ({"resid_topk": 3, "gated_blocks": True}, {"precision": "float64", "lr": 1e200}),
        ({}, {"min_lr_ratio": 0.0, "steps": 130, "warmup": 400}),
    ],
    ids=str,
)
def test_what_a_run_writes_can_be_read(model, train):
    spec = dataclasses.replace(toy_spec(**model), train=toy_train(**train))
    record, _ = execute(spec, toy_corpus(), diagnose_every=5)
    assert RunRecord.from_json(record.to_json()).digest == spec.digest


def test_every_recorded_run_of_the_book_is_read():
    problems = []
    records = load_records(RECORDS, problems.append)
    assert len(records) >= 390 and problems == []


@pytest.mark.parametrize("suite", sorted(path.name for path in RECORDS.iterdir() if path.name[:3] != "gpu"))
def test_parameters_and_work_of_the_books_records_are_those_of_their_spec(suite):
    record = next(iter(load_records(RECORDS / suite).values()))
    spec = record.run_spec
    corpus = load_corpus(spec.corpus) if spec.corpus in HOPS else toy_corpus(6000)
    state = RunState(spec.model, spec.train, corpus, torch.device("cpu"))
    parameters = list(state.model.parameters())
    assert record.parameters == {
        "total": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }
    # What Kolen-Pollack, a late codebook and what precedes the first step cost was counted otherwise then.
    before = spec.model.fa_grape_start or spec.model.vq_init == "kmeans"
    otherwise = spec.model.method == "kp" or spec.train.vq_start or before
    rel, now = 0.025 if otherwise else 1e-5, state.flops_per_token
    counts = [pytest.approx(now, rel=rel), pytest.approx(now + products_left_out(spec.model), rel=rel)]
    assert record.flops_per_token in counts


def products_left_out(config):
    """Return the FLOPs per token of products that the book's older runs still made under direct feedback."""
    if config.method != "dfa":
        return 0
    # The error of the output to keys and to values, by products of their own.
    at_layers = config.dfa_granularity == "layer"
    kept = config.n_layer * 2 * 2 * config.vocab_size * config.n_embd if at_layers else 0
    # The weights' tangents of zeros, on the share of the sequences, behind the first place that is disturbed.
    blocks = config.n_layer - (0 if at_layers else 1)
    weights = blocks * 12 * config.n_embd**2 + config.vocab_size * config.n_embd
    return kept + (config.jvp_share * 2 * weights if config.fa_grape else 0)


@pytest.mark.parametrize(
    ("steps", "every"), [([], 0), ([0], 20), ([0, 20], 20), ([0, 7, 14, 20], 7), ([0, 5, 15, 20], 5)]
)
def test_a_run_is_repeated_with_the_diagnostics_that_it_has(steps, every):
    assert diagnose_every(toy_record(diagnostics={"step": steps} if steps else {})) == every


# Two records


@pytest.mark.parametrize("where", [{}, ELSEWHERE])
@pytest.mark.parametrize(
    ("losses", "again", "agrees"),
    [
        ([3.25, None], [3.25, 9.0], False),
        ([3.25, 9.0], [3.25, None], False),
        ([3.25, None], [3.25, None], True),
        ([None, None], [None, None], True),
        ([None, None], [3.25, None], False),
        ([3.25, None], [3.5, None], False),
        ([3.25, math.nan], [3.25, math.inf], True),
        ([3.25, 2.5], [3.25, 2.5], True),
    ],
)
def test_a_loss_that_one_side_lacks_is_a_difference(losses, again, agrees, where):
    found = judge(measured(losses, "diverged"), measured(again, "diverged", **where), 0.02)
    assert found.agrees == agrees and found.text.startswith("agrees" if agrees else "differs")


@pytest.mark.parametrize("off, agrees", [((0.05, 0.0), True), ((0.0, 0.05), False), ((0.11, 0.0), False)])
def test_elsewhere_an_evaluation_on_fewer_tokens_may_differ_by_more(off, agrees):
    between = dataclasses.replace(SPEC, train=dataclasses.replace(SPEC.train, eval_between=2))
    sides = []
    for first, last in ((0.0, 0.0), off):
        curves = {**toy_record(between).curves, "val_step": [0, 20], "val_loss": [3.25 + first, 2.5 + last]}
        ends = {"final_val_loss": 2.5 + last, "best_val_loss": 2.5 + last}
        sides.append(toy_record(between, curves=curves, **ends))
    found = judge(sides[0], dataclasses.replace(sides[1], **ELSEWHERE), 0.02)
    assert found.agrees == agrees


def test_elsewhere_the_evaluations_must_be_at_the_same_steps():
    found = judge(measured([3.25, 2.5]), measured([3.25, 2.5], steps=(0, 10), **ELSEWHERE), 0.02)
    assert (found.agrees, found.text) == (False, "differs: evaluated at steps [0, 20], now [0, 10]")
    found = judge(measured([3.25, 2.5]), measured([3.25], steps=(0,), **ELSEWHERE), 0.02)
    assert (found.agrees, found.text) == (False, "differs: 2 evaluations recorded, now 1")
    nothing = measured([3.25, 2.5])
    nothing = dataclasses.replace(nothing, curves={**nothing.curves, "val_step": [], "val_loss": []})
    found = judge(nothing, dataclasses.replace(nothing, **ELSEWHERE), 0.02)
    assert (found.agrees, found.text) == (False, "differs: 0 evaluations recorded, now 0")


def test_a_record_that_does_not_say_where_it_was_made_was_made_elsewhere():
    bare = dataclasses.replace(measured([3.25, 2.5]), environment={})
    found = judge(bare, measured([3.25, 2.51]), 0.02)
    assert found.agrees
    unknown = "unknown device, cpu_capability, threads, torch, python: "
    assert found.text.startswith(f"agrees: by 0.01 nats at most ({unknown}")
    some = dataclasses.replace(measured([3.25, 2.5]), environment={"device": "toy", "torch": "1"})
    found = judge(some, measured([3.25, 2.53]), 0.02)
    assert not found.agrees and "(another torch; unknown cpu_capability, threads, python: " in found.text


def test_runs_that_diverged_at_different_steps_differ_between_machines():
    here = measured([3.25, None], "diverged", **ELSEWHERE)
    there = measured([3.25], "diverged", steps=(0,))
    verdict = judge(there, here, 1.0)
    assert not verdict.agrees and verdict.text == "differs: 1 evaluations recorded, now 2"
    assert not judge(measured([None, None]), measured([3.25, 2.5]), 1.0).agrees
    assert judge(there, there, 0.0).agrees


@pytest.mark.parametrize("key", ["device", "cpu_capability", "threads", "torch", "python"])
def test_another_device_thread_count_or_version_is_another_machine(key):
    environment = {**toy_record().environment, key: "another"}
    curves = {**toy_record().curves, "train_loss": [3.0, 2.25]}
    here, there = toy_record(curves=curves), toy_record(environment=environment)
    assert judge(there, here, 0.05).text.startswith(f"agrees: by 0 nats at most (another {key}: validation")
    # On the same machine every curve must be equal; what else an environment says makes no other machine.
    environment = {**toy_record().environment, "numpy": "another", "system": "another"}
    assert judge(toy_record(environment=environment), here, 9.0).text.startswith("differs (same machine")


def test_one_device_is_of_one_kind():
    kinds = ({**toy_record().environment, "device_type": kind} for kind in ("cpu", "cuda"))
    there, here = (toy_record(environment=environment) for environment in kinds)
    verdict = judge(there, here, 9.0)
    assert not verdict.agrees and verdict.text.startswith("differs: device_type recorded cpu, now cuda")


@pytest.mark.parametrize("losses", [[3.0, 2.5], [3.5, 2.5], [3.375, 2.25], [3.5, 2.75]], ids=str)
def test_the_largest_difference_may_be_the_tolerance_itself(losses):
    found = judge(measured([3.25, 2.5], **ELSEWHERE), measured(losses), 0.25)
    assert found.agrees and found.text.startswith("agrees: by 0.25 nats at most (another device: ")
    assert "may differ by 0.25 nats" in found.text
    found = judge(measured([3.25, 2.5], **ELSEWHERE), measured(losses), 0.2499)
    assert not found.agrees and found.text.startswith("differs: by 0.25 nats at most")


def test_runs_that_diverged_in_the_same_evaluation_are_compared_before_it():
    there = RunRecord.from_json(measured([3.25, math.nan], "diverged", **ELSEWHERE).to_json())
    again = measured([3.0, math.nan], "diverged")
    assert judge(there, again, 0.25).text.startswith("agrees: by 0.25 nats at most")


def test_curves_are_compared_to_the_last_digit_that_a_record_keeps():
    rates = toy_record().curves["lr"]
    unrounded, differing = (
        {**toy_record().curves, "lr": [rates[0] * (1 + d), rates[1]]} for d in (4e-8, 2e-5)
    )
    assert judge(toy_record(), toy_record(curves=unrounded), 0.0).agrees
    assert not judge(toy_record(), toy_record(curves=differing), 0.0).agrees


DIAGNOSED = {"step": [0, 20], "cosine": {"a": [0.5, 0.25]}, "rule_rms": [[2e-3, 1e-3], [1e-3, 5e-4]]}


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        ({"cosine": {"a": [0.505, 0.4]}}, True),
        ({"cosine": {"a": [0.52, 0.25]}}, False),
        ({"cosine": {"a": [0.5, 0.5]}}, False),
        ({"cosine": {"a": [None, 0.25]}}, False),
        ({"cosine": {"b": [0.5, 0.25]}}, False),
        ({"rule_rms": [[2.01e-3, 1e-3], [1.3e-3, 5e-4]]}, True),
        ({"rule_rms": [[2e-3, 1e-3], [1e-3, 1e-3]]}, False),
        ({"entropy": {"a": [3.0, 3.0]}}, True),  # measured since
    ],
    ids=str,
)
def test_diagnostics_are_compared_on_their_scale(change, agrees):
    there, here = toy_record(diagnostics=DIAGNOSED), toy_record(diagnostics=DIAGNOSED | change)
    verdict = judge(there, dataclasses.replace(here, **ELSEWHERE), 0.02)
    assert verdict.agrees == agrees
    (name,) = change
    assert agrees or f"diagnostics.{name}" in verdict.text
    assert judge(there, here, 0.02).agrees == (name == "entropy")


@pytest.mark.parametrize("where", [{}, ELSEWHERE])
@pytest.mark.parametrize(
    "change",
    [{"parameters": {"total": 1000, "trained": 901}}, {"flops_per_token": 5500.0}, {"anchor_steps": 1}],
    ids=str,
)
def test_counts_are_the_same_everywhere(change, where):
    verdict = judge(toy_record(**change), toy_record(**where), 9.0)
    (name,) = change
    assert not verdict.agrees and f"{name}" in verdict.text and "recorded" in verdict.text


def test_work_that_is_counted_otherwise_is_said_and_no_difference():
    verdict = judge(toy_record(flops_per_token=5001.0), toy_record(), 0.0)
    assert verdict.agrees
    assert verdict.text.endswith("; counted otherwise: flops_per_token recorded 5001.0, now 5000.0")


def test_training_losses_may_differ_by_five_times_the_tolerance_elsewhere():
    curves = {**toy_record().curves, "train_loss": [3.0, 2.625]}
    there = toy_record(curves=curves, **ELSEWHERE)
    assert judge(there, toy_record(), 0.025).agrees
    verdict = judge(there, toy_record(), 0.0249)
    assert not verdict.agrees and "curves.train_loss recorded 2.625, now 2.5" in verdict.text


def test_a_sample_is_compared_on_the_same_machine_if_there_is_one():
    assert judge(toy_record(sample=""), toy_record(), 0.0).agrees
    assert "sample recorded 'b', now 'a rose'" in judge(toy_record(sample="b"), toy_record(), 0.0).text
    assert judge(toy_record(sample="b", **ELSEWHERE), toy_record(), 0.0).agrees

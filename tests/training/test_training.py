import dataclasses
import json
import math
import pickle
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from toys import interrupt_after, toy_corpus, toy_model, toy_spec, toy_text, toy_train

from localgpt_core.bottlenecks import VQResidualDir
from localgpt_core.config import TrainConfig
from localgpt_core.corpus.batches import batch
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.experiments.execution import execute
from localgpt_core.measure import cost
from localgpt_core.measure.cost import alignment_flops, peak_memory_mib, reset_peak_memory
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.rules import RULES
from localgpt_core.training import curves as training_curves
from localgpt_core.training import loop as training
from localgpt_core.training import state as run_state
from localgpt_core.training import step as steps
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.loop import train
from localgpt_core.training.settings import RunSettings, select_device
from localgpt_core.training.state import RunState
from localgpt_core.training.step import build_model, build_optimizer, evaluate, learning_rate


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


# The learning rate


def test_learning_rate_by_hand():
    config = TrainConfig(lr=1.0, warmup=3, steps=11, min_lr_ratio=0.1)
    # (s + 1) / 4 while s < 3; then 0.1 + 0.9 (1 + cos(pi (s - 3) / 8)) / 2, with cos(pi / 4) = sqrt(2) / 2.
    expected = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 5: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 7: 0.55, 11: 0.1}
    for step, value in expected.items():
        assert learning_rate(step, config) == pytest.approx(value, rel=1e-12), step


@pytest.mark.parametrize(("warmup", "steps_", "expected"), [(0, 4, 1.0), (5, 3, 3 / 6), (3, 3, 3 / 4)])
def test_learning_rate_without_warmup_and_with_nothing_but_warmup(warmup, steps_, expected):
    config = TrainConfig(lr=1.0, warmup=warmup, steps=steps_)
    first_or_last = 0 if warmup == 0 else steps_ - 1
    assert learning_rate(first_or_last, config) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_reaches_the_optimizer_and_the_curve():
    config = toy_train(lr=0.5, steps=6, warmup=2, eval_interval=6)
    run = RunState(toy_model(), config, toy_corpus(), torch.device("cpu"))
    used = []
    while run.step < config.steps:
        run.advance()
        used.append({group["lr"] for group in run.optimizer.param_groups})
    expected = [learning_rate(step, config) for step in range(6)]
    assert used == [{value} for value in expected]
    assert run.curves["lr"] == expected


# The optimiser


def test_weight_decay_is_on_matrices_only():
    config = toy_train(weight_decay=0.25, lr=0.5, beta1=0.8, beta2=0.7)
    model = LocalGPT(toy_model(bias=True, gated_blocks=True))
    optimizer = build_optimizer(model, config)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
    assert decayed["betas"] == plain["betas"] == (0.8, 0.7)
    assert {p.ndim for p in decayed["params"]} == {2} and all(p.ndim < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.25 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_gradients_are_clipped_to_the_global_norm(monkeypatch):
    norms = []
    for grad_clip in (0.01, 0.0):
        config = toy_train(grad_clip=grad_clip)
        run = RunState(toy_model(), config, toy_corpus(), torch.device("cpu"))
        run.advance()
        grads = [p.grad.norm() for p in run.model.parameters()]
        norms.append(torch.stack(grads).norm().item())
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.1


# The evaluation


def mean_loss_one_by_one(model, ids):
    """Cut at every block_size characters and add the characters' losses up, one window at a time."""
    block_size, losses = model.config.block_size, []
    for start in range(0, len(ids) - 1, block_size):
        window = torch.tensor(ids[start : start + block_size + 1].astype(np.int64))
        log_p = functional.log_softmax(model(window[None, :-1])[0][0], dim=-1)
        losses += [-log_p[t, window[t + 1]].item() for t in range(len(window) - 1)]
    assert len(losses) == len(ids) - 1
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("length", [8, 9, 71, 76, 97])  # block_size + 1, + 2, whole windows, a ragged rest
@pytest.mark.parametrize("eval_tokens", [1, 21, 16384])
def test_evaluation_is_the_mean_over_every_character(monkeypatch, length, eval_tokens):
    monkeypatch.setitem(steps.EVAL_TOKENS, "cpu", eval_tokens)
    config = toy_train(precision="float64")
    model = build_model(toy_model(dropout=0.5), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # far from the start, where every character has nearly the same loss
    ids = toy_corpus().val[:length]
    model.train()
    found = evaluate(model, ids, config)
    assert all(module.training for module in model.modules())
    model.eval()
    assert evaluate(model, ids, config) == found
    assert not model.training
    assert found == pytest.approx(mean_loss_one_by_one(model, ids), rel=1e-12)


@pytest.mark.parametrize("eval_tokens", [1, 21, 16384])
@pytest.mark.parametrize(
    "eval_iters, chosen", [(1, [0, 3, 7]), (2, [0, 1, 3, 5, 7, 9]), (3, [0, 1, 2, 3, 4, 6, 7, 8, 9])]
)
def test_an_evaluation_on_some_batches_takes_windows_from_the_whole_split(
    monkeypatch, eval_tokens, eval_iters, chosen
):
    """Of 11 windows of 7 and a rest of 3, the n batches of 3 have those of floor(i 11 / (3 n))."""
    monkeypatch.setitem(steps.EVAL_TOKENS, "cpu", eval_tokens)
    config = toy_train(precision="float64", eval_iters=eval_iters)
    model = build_model(toy_model(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    ids = toy_corpus().val[: 11 * 7 + 1 + 3]
    by_hand = [mean_loss_one_by_one(model, ids[7 * i : 7 * i + 8]) for i in chosen]
    assert len(by_hand) == 3 * eval_iters
    assert evaluate(model, ids, config) == pytest.approx(math.fsum(by_hand) / len(by_hand), rel=1e-12)


def test_an_evaluation_on_as_many_batches_as_there_are_is_one_on_the_whole_split():
    ids = toy_corpus().val[: 11 * 7 + 1 + 3]
    model = build_model(toy_model(), toy_train())
    assert evaluate(model, ids, toy_train(eval_iters=4)) == evaluate(model, ids, toy_train())
    assert evaluate(model, ids, toy_train(eval_iters=3)) != evaluate(model, ids, toy_train())


def test_evaluations_before_the_last_one_take_their_own_windows():
    """Of 11 windows of 7 and a rest of 3, 2 batches of 3 before the end, and all of them there."""
    ids = toy_corpus().val[: 11 * 7 + 1 + 3]
    model = build_model(toy_model(), toy_train())
    by_hand = {n: evaluate(model, ids, toy_train(eval_iters=n)) for n in (0, 1, 2)}
    assert len({*by_hand.values()}) == 3
    for last in (0, 1):
        config = toy_train(eval_iters=last, eval_between=2)
        found = [evaluate(model, ids, config, None, step) for step in (0, 5, 19, 20)]
        assert found == [by_hand[2]] * 3 + [by_hand[last]] == found[:3] + [evaluate(model, ids, config)]
        whole = toy_train(eval_iters=last)
        assert evaluate(model, ids, whole, None, 5) == by_hand[last]


def test_the_evaluations_of_a_run_are_partial_until_its_last_one():
    whole, between = (train(toy_model(), toy_train(eval_between=n), toy_corpus()) for n in (0, 1))
    partial = train(toy_model(), toy_train(eval_iters=1), toy_corpus())
    assert between.curves["train_loss"] == whole.curves["train_loss"]
    assert between.curves["val_step"] == whole.curves["val_step"] == [0, 5, 10, 15, 20]
    assert between.curves["val_loss"] == partial.curves["val_loss"][:-1] + whole.curves["val_loss"][-1:]
    assert all(a != b for a, b in zip(partial.curves["val_loss"], whole.curves["val_loss"], strict=True))
    assert between.best_val_loss == between.final_val_loss == whole.final_val_loss


def test_evaluation_in_several_batches_needs_a_weighted_mean():
    """The check above is blind if the ragged rest has the same mean loss as the other windows."""
    config = toy_train(precision="float64")
    model = build_model(toy_model(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    ids = toy_corpus().val[:76]
    whole, rest = mean_loss_one_by_one(model, ids[:71]), mean_loss_one_by_one(model, ids[70:])
    assert abs(whole - rest) > 1e-3


# A run


def test_the_same_run_twice_gives_the_same_curves_whatever_the_global_generator():
    runs = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        random.seed(global_seed)
        model = toy_model(method="fa", dropout=0.1, fa_grape=True)
        runs.append(train(model, toy_train(), toy_corpus()))
    assert runs[0].curves == runs[1].curves
    assert_same_tensors(runs[0].model.state_dict(), runs[1].model.state_dict())


def test_every_step_has_its_own_dropout_and_probes():
    config = toy_train(lr=1e-30, weight_decay=0.0)
    model_config = toy_model(method="fa", fa_grape=True, dropout=0.5)
    outcomes = []
    for step in (0, 1, 0):
        run = RunState(model_config, config, toy_corpus(), torch.device("cpu"))
        loss = steps.training_step(run.model, run.optimizer, config, *run.batch(0), step)
        outcomes.append((loss.item(), run.model.head.feedback_weight.sum().item()))
    first, second, again = outcomes
    assert first == again
    assert first[0] != second[0] and first[1] != second[1]


def test_another_seed_gives_another_curve():
    first, second = (train(toy_model(), toy_train(seed=seed), toy_corpus()) for seed in (1, 2))
    assert all(a != b for a, b in zip(first.curves["val_loss"], second.curves["val_loss"], strict=True))


def test_training_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    train(toy_model(dropout=0.1), toy_train(steps=3), toy_corpus())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_the_curves_say_when_what_was_measured(monkeypatch):
    monkeypatch.setattr(training_curves, "CURVE_POINTS", 5)
    losses, reported = [], []
    original = run_state.training_step
    monkeypatch.setattr(
        run_state, "training_step", lambda *args: losses.append(original(*args)) or losses[-1]
    )
    result = train(toy_model(), toy_train(steps=21), toy_corpus(), report=reported.append)
    curves = result.curves
    assert (result.status, result.steps_done) == ("finished", 21)
    assert curves["step"] == [4, 8, 12, 16, 20, 21]
    assert curves["tokens"] == [step * 3 * 7 for step in curves["step"]]
    assert curves["val_step"] == [0, 5, 10, 15, 20, 21]
    ends = zip([0, *curves["step"][:-1]], curves["step"], strict=True)
    means = [np.mean([loss.item() for loss in losses[a:b]]) for a, b in ends]
    assert curves["train_loss"] == pytest.approx(means, rel=1e-12)
    assert [r["val_loss"] for r in reported if "val_loss" in r] == curves["val_loss"]
    assert [r["step"] for r in reported if "train_loss" in r] == curves["step"]
    assert result.final_val_loss == curves["val_loss"][-1]
    assert result.best_val_loss == min(curves["val_loss"])


@pytest.mark.parametrize("method", RULES)
def test_the_loss_falls(method):
    config = toy_train(steps=60, batch_size=8, lr=1e-2, eval_interval=60)
    result = train(toy_model(method=method), config, toy_corpus())
    first, last = result.curves["val_loss"]
    assert first == pytest.approx(math.log(toy_corpus().vocab_size), abs=0.05)
    assert last < first - 0.3


def test_models_of_one_seed_start_from_the_same_weights_under_every_rule():
    reference = dict(build_model(toy_model(method="bp"), toy_train()).named_parameters())
    for method in RULES:
        for freeze_body in (False, True):
            model = build_model(toy_model(method=method), toy_train(freeze_body=freeze_body))
            assert_same_tensors(dict(model.named_parameters()), reference)
    other = build_model(toy_model(), toy_train(seed=2)).tok_emb.weight
    assert not torch.equal(other, reference["tok_emb.weight"])


def test_a_frozen_body_keeps_its_weights_and_only_its():
    config = toy_train(freeze_body=True)
    start = dict(build_model(toy_model(), config).named_parameters())
    end = dict(train(toy_model(), config, toy_corpus()).model.named_parameters())
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"tok_emb.weight", "pos_emb.weight", "head.weight"}


@pytest.mark.parametrize(
    ("precision", "dtype", "least", "most"),
    [("float64", torch.float64, 1e-12, 1e-5), ("bfloat16", torch.float32, 1e-6, 0.02)],
)
def test_other_precisions_give_other_numbers_but_the_same_curve(precision, dtype, least, most):
    config = toy_train(lr=1e-2)
    exact = train(toy_model(method="fa"), config, toy_corpus())
    config = dataclasses.replace(config, precision=precision)
    other = train(toy_model(method="fa"), config, toy_corpus())
    assert {p.dtype for p in other.model.parameters()} == {dtype}
    differences = np.abs(np.subtract(exact.curves["val_loss"], other.curves["val_loss"]))
    assert least < differences.max() < most


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_run_gives_nearly_the_same_curve_and_a_plain_checkpoint(monkeypatch, tmp_path):
    calls = []

    def compiled(model, **options):
        calls.append(model)
        return torch_compile(model, backend="aot_eager", **options)  # no C++ compiler needed

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    model = toy_model(method="dfa", n_head=1)
    plain = train(model, toy_train(steps=4), toy_corpus())
    path = tmp_path / "c.safetensors"
    result = train(model, toy_train(steps=4, compile=True), toy_corpus(), checkpoint=path)
    assert calls == [result.model]
    np.testing.assert_allclose(result.curves["train_loss"], plain.curves["train_loss"], rtol=1e-5)
    np.testing.assert_allclose(result.curves["val_loss"], plain.curves["val_loss"], rtol=1e-5)
    assert result.model.state_dict().keys() == plain.model.state_dict().keys()
    load_checkpoint(path).restore_model(LocalGPT(model))


# Interrupted and resumed


RESUMED = toy_model(method="fa", dropout=0.1, fa_grape=True, bias=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run, with a point of the curve every 3 steps and an evaluation every 5, and its last checkpoint."""
    path = tmp_path_factory.mktemp("whole") / "c.safetensors"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training_curves, "CURVE_POINTS", 6)
        result = train(RESUMED, toy_train(lr=1e-2), toy_corpus(), checkpoint=path)
    assert result.curves["step"] == [3, 6, 9, 12, 15, 18, 20]
    return result, load_checkpoint(path)


def interrupt_at_report(step, key):
    def report(measured):
        if measured["step"] == step and key in measured:
            signal.raise_signal(signal.SIGINT)

    return report


def assert_resumed_run_equals(path, uninterrupted):
    result = train(RESUMED, toy_train(lr=1e-2), toy_corpus(), checkpoint=path, resume=True)
    whole, last = uninterrupted
    assert result.status == "finished"
    assert result.curves == whole.curves
    assert_same_tensors(result.model.state_dict(), whole.model.state_dict())
    assert any(name.endswith("feedback_weight") for name in whole.model.state_dict())
    assert_same_tensors(load_checkpoint(path).tensors, last.tensors)


@pytest.mark.parametrize(
    ("step", "key"),
    [
        (0, "val_loss"),  # before the first step: the optimiser has no state yet
        (3, "train_loss"),  # a point of the curve
        (5, "val_loss"),  # an evaluation in the middle between two points
        (15, "train_loss"),  # both are due, the evaluation still to come
        (15, "val_loss"),
    ],
)
def test_resume_after_ctrl_c_in_a_report_is_bit_exact(monkeypatch, tmp_path, uninterrupted, step, key):
    monkeypatch.setattr(training_curves, "CURVE_POINTS", 6)
    path, config = tmp_path / "c.safetensors", toy_train(lr=1e-2)
    report = interrupt_at_report(step, key)
    first = train(RESUMED, config, toy_corpus(), checkpoint=path, report=report)
    assert (first.status, first.steps_done) == ("interrupted", step)
    assert load_checkpoint(path).progress["step"] == step
    assert math.isnan(first.final_val_loss)
    assert_resumed_run_equals(path, uninterrupted)


@pytest.mark.parametrize("stops", [(1,), (7,), (19,), (4, 5), (8, 10, 11), (2, 3, 14)])
def test_resume_after_ctrl_c_in_any_step_is_bit_exact(monkeypatch, tmp_path, uninterrupted, stops):
    monkeypatch.setattr(training_curves, "CURVE_POINTS", 6)
    path, config = tmp_path / "c.safetensors", toy_train(lr=1e-2)
    for stop in stops:
        with monkeypatch.context() as patch:
            interrupt_after(patch, stop)
            result = train(RESUMED, config, toy_corpus(), checkpoint=path, resume=True)
        assert (result.status, result.steps_done) == ("interrupted", stop)
        assert load_checkpoint(path).progress["step"] == stop
    assert_resumed_run_equals(path, uninterrupted)


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_resume_is_bit_exact_in_other_precisions(monkeypatch, tmp_path, precision):
    monkeypatch.setattr(training_curves, "CURVE_POINTS", 4)
    config, path = toy_train(precision=precision, steps=9), tmp_path / "c.safetensors"
    whole = train(RESUMED, config, toy_corpus())
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        train(RESUMED, config, toy_corpus(), checkpoint=path)
    result = train(RESUMED, config, toy_corpus(), checkpoint=path, resume=True)
    assert result.curves == whole.curves
    assert_same_tensors(result.model.state_dict(), whole.model.state_dict())


def test_a_killed_run_goes_on_from_its_last_evaluation(monkeypatch, tmp_path, uninterrupted):
    monkeypatch.setattr(training_curves, "CURVE_POINTS", 6)
    path = tmp_path / "c.safetensors"

    def die(measured):
        if measured["step"] == 12:
            raise MemoryError("killed")

    with pytest.raises(MemoryError, match="killed"):
        train(RESUMED, toy_train(lr=1e-2), toy_corpus(), checkpoint=path, report=die)
    assert load_checkpoint(path).progress["step"] == 10
    assert_resumed_run_equals(path, uninterrupted)


def test_a_checkpoint_is_not_used_unless_asked_for(tmp_path):
    path = tmp_path / "c.safetensors"
    report = interrupt_at_report(5, "val_loss")
    train(toy_model(), toy_train(), toy_corpus(), checkpoint=path, report=report)
    seen = []
    train(toy_model(), toy_train(), toy_corpus(), checkpoint=path, report=seen.append)
    assert seen[0]["step"] == 0


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    path = tmp_path / "c.safetensors"
    whole = train(toy_model(), toy_train(), toy_corpus(), checkpoint=path)
    again = train(toy_model(), toy_train(), toy_corpus(), checkpoint=path, resume=True)
    assert (again.status, again.steps_done, again.curves) == ("finished", 20, whole.curves)
    assert again.wall_time_s >= whole.wall_time_s


def test_the_optimiser_state_goes_to_its_parameter(tmp_path):
    config = toy_model(method="kp", gated_blocks=True)
    run = RunState(config, toy_train(), toy_corpus(), torch.device("cpu"))
    run.evaluate()
    run.advance()
    run.save(tmp_path / "c.safetensors")
    saved = load_checkpoint(tmp_path / "c.safetensors")
    again = RunState(config, toy_train(), toy_corpus(), torch.device("cpu"), checkpoint=saved)
    names = {name: tensor for name, tensor in (*again.model.named_parameters(), *again.model.named_buffers())}
    seen = 0
    for name, tensor in (*run.model.named_parameters(), *run.model.named_buffers()):
        if tensor in run.optimizer.state:
            seen += 1
            found, expected = again.optimizer.state[names[name]], run.optimizer.state[tensor]
            assert_same_tensors(dict(found), dict(expected))
    assert seen == len(run.optimizer.state) == len(again.optimizer.state) > 20


# Ctrl-C


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)

    def twice(measured):
        if measured["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(toy_model(), toy_train(), toy_corpus(), report=twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_usual_handler_is_back_after_a_run_however_it_ends():
    before = signal.getsignal(signal.SIGINT)
    during = []
    train(
        toy_model(),
        toy_train(),
        toy_corpus(),
        report=lambda m: during.append(signal.getsignal(signal.SIGINT)),
    )
    assert before not in during
    assert signal.getsignal(signal.SIGINT) is before
    result = train(toy_model(), toy_train(), toy_corpus(), report=interrupt_at_report(5, "val_loss"))
    assert result.status == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before

    def fail(measured):
        raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        train(toy_model(), toy_train(), toy_corpus(), report=fail)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_outside_the_main_thread_needs_no_handler():
    before, results, handlers = signal.getsignal(signal.SIGINT), [], []

    def run():
        report = lambda measured: handlers.append(signal.getsignal(signal.SIGINT))  # noqa: E731
        results.append(train(toy_model(), toy_train(), toy_corpus(), report=report))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results[0].status == "finished"
    assert results[0].curves == train(toy_model(), toy_train(), toy_corpus()).curves
    assert set(handlers) == {before}


# Runs that do not finish


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_recorded(tmp_path, lr):
    spec = toy_spec()
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, lr=lr))
    record, result = execute(spec, toy_corpus(), checkpoint=tmp_path / "c.safetensors")
    assert result.status == record.status == "diverged"
    assert result.steps_done < 5
    assert math.isfinite(result.curves["train_loss"][0]) and math.isnan(result.curves["train_loss"][-1])
    assert len(result.curves["val_loss"]) == 1
    assert math.isnan(result.final_val_loss) and result.best_val_loss == result.curves["val_loss"][0]
    assert record.final_val_loss is None and record.sample == ""
    written = json.loads(record.to_json())
    assert written["final_val_loss"] is None and written["status"] == "diverged"
    assert written["curves"]["train_loss"][-1] is None
    assert not (tmp_path / "c.safetensors").exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(monkeypatch):
    losses = iter([3.0, 2.5, math.nan])
    monkeypatch.setattr(run_state, "evaluation", lambda *args: (next(losses), 0.0))
    result = train(toy_model(), toy_train(), toy_corpus())
    assert (result.status, result.steps_done) == ("diverged", 10)
    assert result.best_val_loss == 2.5 and math.isnan(result.final_val_loss)


class Clock:
    """A clock that moves by one second a training step, and stands still otherwise."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        original = steps.training_step
        monkeypatch.setattr(run_state, "training_step", lambda *args: self.tick() or original(*args))
        monkeypatch.setattr(training.time, "monotonic", lambda: self.now)

    def tick(self):
        self.now += 1.0


@pytest.mark.parametrize(
    ("seconds", "status", "steps_done"), [(40.0, "finished", 40), (39.5, "out_of_time", 25)]
)
def test_a_run_that_cannot_make_its_deadline_is_given_up_early(monkeypatch, seconds, status, steps_done):
    clock = Clock(monkeypatch)
    result = train(toy_model(), toy_train(steps=40), toy_corpus(), deadline=clock.now + seconds)
    assert (result.status, result.steps_done) == (status, steps_done)


class Queue(Clock):
    """A device that is at work when a step has returned: a step takes its second as soon as one waits."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.queued = 0.0
        monkeypatch.setattr(training, "wait_for", self.wait)

    def tick(self):
        self.queued += 1.0

    def wait(self, device):
        assert device == torch.device("cpu")
        self.now, self.queued = self.now + self.queued, 0.0


@pytest.mark.parametrize(
    ("seconds", "status", "steps_done"), [(40.0, "finished", 40), (39.5, "out_of_time", 25)]
)
def test_the_speed_of_a_device_is_measured_when_it_has_done_its_steps(
    monkeypatch, seconds, status, steps_done
):
    clock = Queue(monkeypatch)
    result = train(toy_model(), toy_train(steps=40), toy_corpus(), deadline=clock.now + seconds)
    assert (result.status, result.steps_done) == (status, steps_done)


def test_a_deadline_in_the_past_stops_after_one_step(tmp_path):
    path = tmp_path / "c.safetensors"
    record, result = execute(toy_spec(), toy_corpus(), deadline=time.monotonic() - 1, checkpoint=path)
    assert record is None and (result.status, result.steps_done) == ("out_of_time", 1)
    record, resumed = execute(toy_spec(), toy_corpus(), checkpoint=path, resume=True)
    assert record.curves == execute(toy_spec(), toy_corpus())[0].curves


def test_a_run_with_a_checkpoint_goes_on_until_its_time_is_over_and_leaves_one(monkeypatch, tmp_path):
    clock, path, config = Clock(monkeypatch), tmp_path / "c.safetensors", toy_train(steps=40)
    first = train(toy_model(), config, toy_corpus(), deadline=clock.now + 32.5, checkpoint=path)
    assert (first.status, first.steps_done, load_checkpoint(path).progress["step"]) == ("out_of_time", 33, 33)
    second = train(toy_model(), config, toy_corpus(), checkpoint=path, resume=True)
    assert second.curves == train(toy_model(), config, toy_corpus()).curves


def test_a_run_that_breaks_down_has_a_record_that_says_why(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(run_state, "training_step", fail)
    record, result = execute(toy_spec(), toy_corpus(), suite="toys", arm="a")
    assert result is None
    assert (record.status, record.error) == ("failed", "OutOfMemoryError: no memory left")
    assert record.final_val_loss is None and record.curves == {}


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_a_run_that_this_machine_cannot_hold_has_a_record(monkeypatch, allocate):
    monkeypatch.setattr(run_state, "training_step", lambda *args: allocate(2**58))
    record, result = execute(toy_spec(), toy_corpus())
    assert result is None and record.status == "failed"
    assert "alloc" in record.error.lower()


# What is refused


def other_corpus():
    text = toy_text()
    return Corpus("toy", text[:-1] + ("a" if text[-1] != "a" else "b"), toy_corpus().vocabulary)


DIFFERENT_RUNS = {
    "n_embd": (toy_model(n_embd=16), toy_train(), toy_corpus()),
    "n_layer": (toy_model(n_layer=2), toy_train(), toy_corpus()),
    "method": (toy_model(method="fa"), toy_train(), toy_corpus()),
    "dropout": (toy_model(dropout=0.5), toy_train(), toy_corpus()),
    "seed": (toy_model(), toy_train(seed=2), toy_corpus()),
    "lr": (toy_model(), toy_train(lr=0.25), toy_corpus()),
    "steps": (toy_model(), toy_train(steps=21), toy_corpus()),
    "precision": (toy_model(), toy_train(precision="bfloat16"), toy_corpus()),
    "corpus": (toy_model(), toy_train(), other_corpus()),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    train(toy_model(), toy_train(), toy_corpus(), checkpoint=path)
    return path


@pytest.mark.parametrize("field", DIFFERENT_RUNS)
def test_a_checkpoint_of_another_run_is_refused_with_the_field_that_differs(checkpoint, field):
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=rf"of another run: it has {field}=[^;]*, asked [^;]*$") as caught:
        train(*DIFFERENT_RUNS[field], checkpoint=checkpoint, resume=True)
    assert str(checkpoint) in str(caught.value)
    assert checkpoint.read_bytes() == before


def test_every_field_that_differs_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"it has method='bp', asked 'fa'; lr=0.001, asked 0.25$"):
        train(toy_model(method="fa"), toy_train(lr=0.25), toy_corpus(), checkpoint=checkpoint, resume=True)


def assert_refused(path):
    """``path`` is refused in one line that names it, before anything is trained."""
    with pytest.raises(ValueError) as caught:
        train(toy_model(), toy_train(), toy_corpus(), checkpoint=path, resume=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.1, 0.5, 0.9, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path, kept):
    data = checkpoint.read_bytes()
    length = int(kept * len(data)) if isinstance(kept, float) else kept % len(data)
    path = tmp_path / "short.safetensors"
    path.write_bytes(data[:length])
    assert_refused(path)


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_refused(tmp_path, seed):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(random.Random(seed).randbytes(10 ** (seed + 1)))
    assert_refused(path)


def rewrite(source, path, change):
    """Copy a checkpoint, changed by ``change(header, tensors)``, as one of old: without a checksum."""
    with safe_open(source, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["sha256"]
    change(header, tensors)
    safetensors.torch.save_file(tensors, path, metadata=header)


DAMAGES = {
    "no header": lambda header, tensors: header.clear(),
    "another format": lambda header, tensors: header.update(format="something else"),
    "a header without the run": lambda header, tensors: header.pop("train"),
    "a header that is no JSON": lambda header, tensors: header.update(model="{"),
    "a header of another kind": lambda header, tensors: header.update(model="[1]"),
    "a field that nobody knows": lambda header, tensors: header.update(model='{"n_heads": 2}'),
    "progress without a step": lambda header, tensors: header.update(progress="{}"),
    "a tensor too few": lambda header, tensors: tensors.pop("model.head.weight"),
    "a tensor of another shape": lambda header, tensors: tensors.update({"model.head.weight": torch.ones(2)}),
    "an optimiser state too few": lambda header, tensors: tensors.pop("optimizer.head.weight.exp_avg"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_foreign_or_damaged_checkpoint_is_refused(checkpoint, tmp_path, damage):
    path = tmp_path / "foreign.safetensors"
    rewrite(checkpoint, path, DAMAGES[damage])
    assert_refused(path)


def test_a_copy_that_is_not_damaged_is_accepted(checkpoint, tmp_path):
    """The refusals above are not about the copying."""
    path = tmp_path / "copy.safetensors"
    rewrite(checkpoint, path, lambda header, tensors: None)
    assert train(toy_model(), toy_train(), toy_corpus(), checkpoint=path, resume=True).status == "finished"


def test_a_checkpoint_holds_no_pickle(checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    tensors = safetensors.torch.load(checkpoint.read_bytes())
    assert_same_tensors(tensors, load_checkpoint(checkpoint).tensors)
    with safe_open(checkpoint, framework="pt") as file:
        header = file.metadata()
    kept = {key: json.loads(header[key]) for key in header if key not in ("format", "sha256")}
    assert kept.keys() == {"model", "train", "corpus", "progress"}
    assert all(isinstance(value, dict) for value in kept.values())


def test_a_run_without_a_checkpoint_starts_anew_when_resumed(tmp_path):
    path = tmp_path / "none.safetensors"
    assert train(toy_model(), toy_train(), toy_corpus(), checkpoint=path, resume=True).status == "finished"
    with pytest.raises(ValueError, match="no such file"):
        load_checkpoint(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_an_absent_gpu_is_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=rf"device='{device}': this machine has 0 CUDA devices"):
        train(toy_model(), toy_train(), toy_corpus(), device=device)


@pytest.mark.parametrize("device", ["tpu", "meta", "", "cpu:x", "mps"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=rf"device='{device}': allowed are 'cpu', 'cuda' or 'cuda:N'"):
        select_device(device)


def test_a_context_longer_than_the_validation_split_is_refused():
    corpus = toy_corpus(200)
    assert len(corpus.val) == 20
    train(toy_model(block_size=19, vocab_size=corpus.vocab_size), toy_train(steps=1), corpus)
    with pytest.raises(ValueError, match=r"block_size=20: a window of 21 characters does not fit into 20"):
        train(toy_model(block_size=20, vocab_size=corpus.vocab_size), toy_train(steps=1), corpus)


def test_a_vocabulary_of_another_size_is_refused():
    size = toy_corpus().vocab_size
    with pytest.raises(ValueError, match=rf"vocab_size={size + 1}: must be the {size} of corpus 'toy'"):
        train(toy_model(vocab_size=size + 1), toy_train(), toy_corpus())


def test_a_spec_of_another_text_is_refused():
    with pytest.raises(
        ValueError, match=rf"corpus='toy': the spec wants 'toy' with sha256 {toy_corpus().sha256}"
    ):
        execute(toy_spec(), other_corpus())


# ------------------------------------------------------------ a codebook that comes late


@pytest.mark.parametrize("init", ["random", "kmeans"])
def test_before_its_first_step_a_codebook_is_not_there(init):
    late = toy_train(steps=8, vq_start=5, eval_interval=1)
    found = train(toy_model(vq_codes=6, vq_init=init), late, toy_corpus()).curves["val_loss"]
    plain = train(toy_model(), toy_train(steps=8, eval_interval=1), toy_corpus()).curves["val_loss"]
    assert found[:5] == plain[:5] and found[5] != plain[5]


def test_a_codebook_is_fitted_once_to_what_the_model_is_then():
    books = []
    for start, seed in ((0, 1), (4, 1), (4, 1), (4, 2)):
        config = toy_train(steps=6, vq_start=start, seed=seed)
        result = train(toy_model(vq_codes=6, vq_init="kmeans"), config, toy_corpus())
        books.append(next(result.model.codebooks()).codebook)
    assert torch.equal(books[1], books[2])
    assert not torch.equal(books[0], books[1]) and not torch.equal(books[1], books[3])
    # The random codes follow no data.
    assert torch.equal(LocalGPT(toy_model(vq_codes=6)).blocks[0].vq.codebook, VQResidualDir(8, 6).codebook)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_run_with_a_late_codebook_resumes_bit_for_bit(monkeypatch, tmp_path, stop):
    model, config = toy_model(vq_codes=6, vq_init="kmeans"), toy_train(steps=8, vq_start=4)
    whole = train(model, config, toy_corpus())
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        train(model, config, toy_corpus(), checkpoint=tmp_path / "c")
    resumed = train(model, config, toy_corpus(), checkpoint=tmp_path / "c", resume=True)
    assert resumed.curves == whole.curves
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())


def test_a_late_start_of_no_codebook_is_refused():
    with pytest.raises(ValueError, match="vq_start=3: has no effect without vq_codes"):
        train(toy_model(), toy_train(vq_start=3), toy_corpus())


def test_settings_are_checked_before_anything_is_computed():
    for field, value in (("threads", 0), ("diagnose_every", -1), ("device", "tpu")):
        with pytest.raises(ValueError, match=f"^{field}={value!r}: "):
            RunSettings(**{field: value})
    with pytest.raises(ValueError, match="settings=.*: or their fields by name, not both"):
        train(toy_model(), toy_train(), toy_corpus(), RunSettings(), device="cpu")
    with pytest.raises(TypeError, match="speed"):
        train(toy_model(), toy_train(), toy_corpus(), speed=3)


def test_settings_reach_the_run_by_name_or_as_one():
    steps = []
    named = train(toy_model(), toy_train(), toy_corpus(), report=lambda m: steps.append(m["step"]))
    settings = RunSettings(report=lambda m: steps.append(m["step"]), threads=2)
    as_one = train(toy_model(), toy_train(), toy_corpus(), settings)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert named.curves == as_one.curves and steps[: len(steps) // 2] == steps[len(steps) // 2 :]


# ------------------------------------------------------------ what is done once, and what it costs

ALIGNED_FIRST = {"method": "fa", "fa_grape": True, "fa_grape_start": 5}
FITTED = {"vq_codes": 6, "vq_init": "kmeans"}


@pytest.mark.parametrize("stop", [0, 3, 20])
def test_what_comes_before_the_first_step_is_not_repeated_by_a_resumed_run(monkeypatch, tmp_path, stop):
    done = []
    align, fit = LocalGPT.align_feedback, LocalGPT.fit_codebooks

    def counted_alignment(model, *key, **others):
        done.extend(["start"] if "start" in key else [])
        align(model, *key, **others)

    def counted_fit(model, *args, **others):
        done.append("fit")
        fit(model, *args, **others)

    monkeypatch.setattr(LocalGPT, "align_feedback", counted_alignment)
    monkeypatch.setattr(LocalGPT, "fit_codebooks", counted_fit)
    model, config = toy_model(**ALIGNED_FIRST, **FITTED), toy_train(lr=1e-2)
    whole = train(model, config, toy_corpus())
    assert done == ["start"] * 5 + ["fit"]
    path = tmp_path / "c"
    run = RunState(model, config, toy_corpus(), torch.device("cpu"))
    for _ in range(stop):
        if run.evaluation_due:
            run.evaluate()
        run.advance()
    run.save(path)
    done.clear()
    resumed = train(model, config, toy_corpus(), checkpoint=path, resume=True)
    assert done == []
    assert resumed.curves == whole.curves and resumed.flops_per_token == whole.flops_per_token
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())


def flops_of_run(model: dict, **config) -> float:
    """Return the matmul FLOPs that a run is said to take."""
    config = toy_train(steps=10, **config)
    run = RunState(toy_model(**model), config, toy_corpus(), torch.device("cpu"))
    return run.flops_per_token * 10 * config.batch_size * run.model.config.block_size


def flops_that_are_counted(model: dict, **config) -> int:
    """Return the matmul FLOPs that torch counts while a run starts and takes all of its steps."""
    run = RunState(toy_model(**model), toy_train(steps=10, **config), toy_corpus(), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        run._start()
        for _ in range(10):
            run.advance()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ({}, {}),
        (ALIGNED_FIRST, {}),
        ({"method": "dfa", "fa_grape": True, "fa_grape_start": 2}, {"anchor_interval": 3}),
        (FITTED, {}),
        (FITTED | {"n_layer": 2, "vq_shared": False}, {"vq_start": 4}),
        ({"vq_codes": 6, "method": "dfa"}, {"vq_start": 7, "anchor_interval": 4}),
    ],
)
def test_the_flops_of_a_run_are_all_that_it_takes(model, config):
    assert flops_of_run(model, **config) == pytest.approx(flops_that_are_counted(model, **config), rel=1e-12)


def test_a_run_of_a_thousand_million_steps_is_counted_without_going_through_them():
    sizes = {"anchor_interval": 4, "vq_start": 500_000_000, "eval_interval": 1_000_000_000}
    model = {"vq_codes": 6, "method": "dfa"}
    long, short = (
        RunState(
            toy_model(**model), toy_train(steps=steps, **(sizes | start)), toy_corpus(), torch.device("cpu")
        )
        for steps, start in ((1_000_000_000, {}), (8, {"vq_start": 4}))
    )
    assert long.flops_per_token == pytest.approx(short.flops_per_token, rel=1e-12)


def test_every_alignment_before_the_first_step_is_counted():
    one = alignment_flops(LocalGPT(toy_model(**ALIGNED_FIRST)), torch.zeros(3, 7, dtype=torch.long))
    without = flops_of_run({**ALIGNED_FIRST, "fa_grape_start": 0})
    assert one > 0 and flops_of_run(ALIGNED_FIRST) - without == pytest.approx(5 * one, rel=1e-9)


# ------------------------------------------------------------ memory

BALLAST_MIB = 300


def allocate() -> None:
    torch.ones(BALLAST_MIB * 2**18).sum()  # of four bytes


@pytest.fixture
def linux():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("only Linux forgets the peak of a process")


def test_the_peak_memory_of_a_run_is_not_that_of_what_was_before_it(linux):
    first = train(toy_model(), toy_train(), toy_corpus()).peak_memory_mib
    allocate()
    assert peak_memory_mib(torch.device("cpu")) > first + BALLAST_MIB / 2
    second = train(toy_model(), toy_train(), toy_corpus()).peak_memory_mib
    assert 0 < second < first + BALLAST_MIB / 2


def test_the_peak_memory_of_a_run_is_that_of_what_it_allocates(linux):
    small = train(toy_model(), toy_train(), toy_corpus()).peak_memory_mib
    large = train(toy_model(), toy_train(), toy_corpus(), report=lambda measured: allocate()).peak_memory_mib
    assert large > small + BALLAST_MIB / 2


def test_where_the_system_keeps_no_account_the_peak_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "STATUS", tmp_path / "missing")
    monkeypatch.setattr(cost, "RESET_PEAK", tmp_path / "missing" / "too")
    reset_peak_memory(torch.device("cpu"))
    assert not (tmp_path / "missing").exists()
    allocate()
    assert peak_memory_mib(torch.device("cpu")) > BALLAST_MIB
    monkeypatch.setattr(cost, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t  9 kB\nVmHWM:\t    2560 kB\n")
    assert peak_memory_mib(torch.device("cpu")) == 2.5


# ------------------------------------------------------------ what the numbers of a run are taken from


def test_the_validation_loss_is_measured_on_the_validation_split():
    corpus, config = toy_corpus(), toy_train(lr=1e-2, precision="float64")
    result = train(toy_model(), config, corpus)
    model = result.model.eval()
    found, seen = (mean_loss_one_by_one(model, ids) for ids in (corpus.val, corpus.train))
    assert result.final_val_loss == pytest.approx(found, rel=1e-12)
    assert abs(found - seen) > 1e-3


def training_batch(step, config, block_size=7):
    ids = toy_corpus().train
    return batch(ids, batch_size=config.batch_size, block_size=block_size, seed=config.seed, step=step)[0]


@pytest.mark.parametrize("start", [0, 2])
def test_a_codebook_is_fitted_to_the_inputs_of_the_first_32_batches(monkeypatch, start):
    given, config = [], toy_train(steps=3, seed=5, vq_start=start)
    original = LocalGPT.fit_codebooks
    monkeypatch.setattr(
        LocalGPT,
        "fit_codebooks",
        lambda self, text, *key, **others: given.append(text) or original(self, text, *key, **others),
    )
    train(toy_model(vq_codes=6, vq_init="kmeans"), config, toy_corpus())
    (text,) = given
    assert torch.equal(text, torch.cat([training_batch(i, config) for i in range(32)]))


def test_every_alignment_before_the_first_step_sees_its_own_batch(monkeypatch):
    seen, config = [], toy_train(seed=5)
    model = toy_model(method="dfa", fa_grape=True, fa_grape_start=3)
    original = LocalGPT.align_feedback

    def align(self, *key, idx=None, **others):
        if "start" in key:
            seen.append((key, idx))
        return original(self, *key, idx=idx, **others)

    monkeypatch.setattr(LocalGPT, "align_feedback", align)
    RunState(model, config, toy_corpus(), torch.device("cpu"))
    assert [key for key, _ in seen] == [(5, "start", i) for i in range(3)]
    assert all(torch.equal(idx, training_batch(i, config)) for i, (_, idx) in enumerate(seen))


def test_times_are_those_of_every_part_of_a_resumed_run(monkeypatch, tmp_path):
    """A training step takes 2 s, then 4 s; an evaluation 5 s; between the two parts a day goes by."""
    now, path, config = [0.0], tmp_path / "c.safetensors", toy_train(steps=10)

    def taking(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)

        return slow

    step = run_state.training_step
    monkeypatch.setattr(run_state, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(run_state, "training_step", taking(2.0, step))
    monkeypatch.setattr(run_state, "evaluation", taking(5.0, run_state.evaluation))
    report = interrupt_at_report(7, "train_loss")
    first = train(toy_model(), config, toy_corpus(), checkpoint=path, report=report)
    assert (first.steps_done, first.wall_time_s) == (7, 7 * 2 + 2 * 5)
    assert first.tokens_per_s == 7 * 21 / 14
    now[0] += 86400
    monkeypatch.setattr(run_state, "training_step", taking(4.0, step))
    whole = train(toy_model(), config, toy_corpus(), checkpoint=path, resume=True)
    assert whole.wall_time_s == 7 * 2 + 3 * 4 + 3 * 5
    assert whole.tokens_per_s == 10 * 21 / (7 * 2 + 3 * 4)


@pytest.mark.parametrize("freeze_body", [False, True])
def test_the_flops_of_a_token_by_hand(freeze_body):
    config = toy_train(freeze_body=freeze_body)
    found = RunState(toy_model(), config, toy_corpus(), torch.device("cpu")).flops_per_token
    width, context, vocabulary = 8, 7, toy_corpus().vocab_size
    body, mixing, head = 12 * width**2, 2 * context * width, vocabulary * width
    # A product of matrices forward has two backward; a weight that is not trained needs only the error's.
    passes = 3 * (body + mixing + head) - (body if freeze_body else 0)
    assert found == 2 * passes


def test_a_run_that_stops_early_counts_the_anchors_it_took():
    config = toy_train(anchor_interval=3)
    report = interrupt_at_report(8, "train_loss")
    result = train(toy_model(method="fa"), config, toy_corpus(), report=report)
    assert (result.status, result.steps_done, result.anchor_steps) == ("interrupted", 8, 2)


def test_without_a_finite_validation_loss_there_is_no_best_one(monkeypatch):
    monkeypatch.setattr(run_state, "evaluation", lambda *args: (math.inf, 0.0))
    result = train(toy_model(), toy_train(), toy_corpus())
    assert (result.status, result.steps_done) == ("diverged", 0) and math.isnan(result.best_val_loss)


def test_an_evaluation_has_the_precision_of_its_run():
    model, ids = build_model(toy_model(), toy_train()), toy_corpus().val
    exact, rounded = (evaluate(model, ids, toy_train(precision=p)) for p in ("float32", "bfloat16"))
    assert 1e-7 < abs(exact - rounded) < 0.02

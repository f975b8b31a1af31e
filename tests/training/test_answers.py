"""Runs on a corpus of sequences: what counts in the loss, the error and the evaluation, and what is kept."""

import dataclasses
import json

import pytest
import torch
from toys import toy_record, toy_train

from localgpt_core import LocalGPTConfig
from localgpt_core.common.validation import Refusal
from localgpt_core.corpus.batches import windows
from localgpt_core.corpus.corpus import SHA256, Corpus
from localgpt_core.corpus.sequences import IGNORED, Sequences
from localgpt_core.experiments import execute
from localgpt_core.experiments.suites import read_suite
from localgpt_core.experiments.verification import judge
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.records import RunRecord, load_records
from localgpt_core.records.specs import RunSpec
from localgpt_core.training import load_checkpoint, train
from localgpt_core.training import step as steps
from localgpt_core.training.before import check_corpus
from localgpt_core.training.checkpoints import lengthened
from localgpt_core.training.step import build_model, evaluate, evaluation

SIXES = Sequences(period=6, answers=(3, 5), chance=0.5, guess=0.7)
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 5, "vocab_size": 4, "dropout": 0.0}


def sixes() -> Corpus:
    """Return a text whose answers repeat what stands two characters before them, and whose rest does not."""
    words = ["".join("abcd"[(3 * i + j * j) % 4] for j in range(4)) for i in range(40)]
    return Corpus("sixes", "".join(f"{w[:3]}{w[1]}{w[3]}{w[1]}" for w in words), "abcd", SIXES)


def model_of(**options) -> LocalGPTConfig:
    return LocalGPTConfig(**{**SIZES, **options})


def test_the_loss_is_the_mean_over_the_answers_alone():
    torch.manual_seed(1)
    model = LocalGPT(model_of(), dtype=torch.float64)
    idx = torch.randint(4, (3, 5))
    targets = SIXES.counted(torch.randint(4, (3, 5)))
    assert (targets != IGNORED).nonzero()[:, 1].tolist() == [2, 4] * 3
    logits, loss = model(idx, targets)
    by_hand = [logits[b, t].log_softmax(0)[targets[b, t]] for b in range(3) for t in (2, 4)]
    assert loss.item() == pytest.approx(-sum(by_hand).item() / 6, rel=1e-12)


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_published_error_is_zero_where_no_answer_stands(granularity):
    torch.manual_seed(1)
    model = LocalGPT(model_of(method="dfa", dfa_granularity=granularity), dtype=torch.float64)
    taps = []
    model.blocks[0].register_forward_hook(lambda block, args, out: taps.extend(args[1]))
    idx = torch.randint(4, (3, 5))
    targets = SIXES.counted(torch.randint(4, (3, 5)))
    logits, loss = model(idx, targets)
    assert taps
    errors = torch.autograd.grad(loss, [logits], retain_graph=True)
    wanted = torch.zeros(3, 5, 4, dtype=torch.float64)
    for b in range(3):
        for t in (2, 4):
            wanted[b, t] = (logits[b, t].softmax(0) - torch.eye(4)[targets[b, t]]) / 6
    for error in errors:
        torch.testing.assert_close(error, wanted, rtol=1e-12, atol=1e-15)
    found = []
    for tap in taps:
        tap.register_hook(found.append)
    loss.backward()
    assert len(found) == len(taps)
    for error in found:
        torch.testing.assert_close(error, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("eval_tokens", [1, 15, 4096])
def test_an_evaluation_counts_answers_by_hand(monkeypatch, eval_tokens):
    monkeypatch.setitem(steps.EVAL_TOKENS, "cpu", eval_tokens)
    config = toy_train(precision="float64")
    model, corpus = build_model(model_of(), config), sixes()
    x, y, *_ = windows(corpus.val, 5, SIXES)
    assert len(x) == 4
    logits = model(x)[0]
    losses, right = [], 0
    for b in range(len(x)):
        for place in SIXES.answers:
            answer = corpus.val[6 * b + place].item()
            losses.append(-logits[b, place - 1].log_softmax(0)[answer].item())
            right += logits[b, place - 1].argmax().item() == answer
    loss, accuracy = evaluation(model, corpus.val, config, None, None, SIXES)
    assert loss == pytest.approx(sum(losses) / 8, rel=1e-12)
    assert accuracy == right / 8
    assert evaluate(model, corpus.val, config) != loss


def test_a_run_on_answers_learns_them_and_has_their_accuracy(tmp_path):
    config = toy_train(steps=120, lr=2e-2, eval_interval=40, batch_size=16)
    result = train(model_of(n_embd=16), config, sixes(), checkpoint=tmp_path / "c.safetensors")
    assert len(result.curves["val_accuracy"]) == len(result.curves["val_step"]) == 4
    assert result.curves["val_accuracy"][-1] == 1.0 and result.curves["val_loss"][-1] < 0.1
    found = evaluation(result.model, sixes().val, config, None, None, SIXES)
    assert found == (result.curves["val_loss"][-1], result.curves["val_accuracy"][-1])
    assert load_checkpoint(tmp_path / "c.safetensors").progress["curves"] == result.curves


def test_a_run_on_answers_resumes_and_is_made_longer_bit_for_bit(tmp_path):
    config = toy_train(steps=13, min_lr_ratio=1.0)
    whole = train(model_of(), config, sixes())
    short = dataclasses.replace(config, steps=7)
    train(model_of(), short, sixes(), checkpoint=tmp_path / "short.safetensors")
    lengthened(load_checkpoint(tmp_path / "short.safetensors"), 13, tmp_path / "c.safetensors").write()
    again = train(model_of(), config, sixes(), checkpoint=tmp_path / "c.safetensors", resume=True)
    assert again.curves == whole.curves and len(whole.curves["val_accuracy"]) == 4


@pytest.mark.parametrize("method", ["bp", "fa", "dfa", "kp"])
def test_every_kind_of_rule_runs_on_answers(method):
    options = {"fa_grape": True} if method != "bp" else {}
    assert train(model_of(method=method, **options), toy_train(steps=3), sixes()).status == "finished"


def test_codes_are_fitted_and_rules_diagnosed_on_whole_sequences():
    model = model_of(method="fa", fa_grape=True, vq_codes=4, vq_init="kmeans")
    result = train(model, toy_train(steps=3), sixes(), diagnose_every=1)
    assert result.status == "finished" and result.diagnostics["step"] == [0, 1, 2, 3]


def test_another_context_is_refused_before_anything_is_trained():
    with pytest.raises(Refusal, match="block_size=7: must be 5: a window is a sequence of 6 characters"):
        check_corpus(model_of(block_size=7), toy_train(), sixes())


# Records


def spec() -> RunSpec:
    return RunSpec(model_of(), toy_train(eval_interval=10), "sixes", sixes().sha256)


def record_with(accuracies, asked=None, **changes) -> RunRecord:
    record = toy_record(asked or spec(), **changes)
    return dataclasses.replace(record, curves={**record.curves, "val_accuracy": accuracies})


def test_a_record_keeps_the_accuracy(tmp_path):
    record, _ = execute(spec(), sixes(), suite="toys", arm="bp", preset="tiny", out=tmp_path)
    record.write(tmp_path)
    kept = load_records(tmp_path)[record.digest]
    assert record.final_val_accuracy == record.curves["val_accuracy"][-1]
    assert kept.final_val_accuracy == pytest.approx(record.final_val_accuracy, rel=1e-5)
    assert record_with([0.5, 0.5, 0.25], status="diverged").final_val_accuracy is None
    assert toy_record().final_val_accuracy is None


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ([0.5, 0.5], "curves.val_accuracy=.*: 2 values for 3 steps"),
        ([0.5, 0.5, 1.5], "curves.val_accuracy=1.5: must be from 0 to 1"),
        ([0.5, -0.5, 0.5], "curves.val_accuracy=-0.5: must be"),
        ([0.5, None, 0.5], "curves.val_accuracy=None: must be"),
        ([0.5, "1", 0.5], "curves='val_accuracy': must be a list of numbers"),
    ],
)
def test_accuracies_that_cannot_be_are_refused(accuracies, message):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_json(record_with(accuracies).to_json())


def test_a_corpus_with_a_name_says_whether_there_are_accuracies():
    recall = RunSpec(model_of(), toy_train(eval_interval=10), "recall-2", SHA256["recall-2"])
    plays = dataclasses.replace(recall, corpus="complete", corpus_sha256=SHA256["complete"])
    RunRecord.from_json(record_with([0.5] * 3, recall).to_json())
    RunRecord.from_json(toy_record(plays).to_json())
    with pytest.raises(ValueError, match="curves=.*corpus 'recall-2' has answers"):
        RunRecord.from_json(toy_record(recall).to_json())
    with pytest.raises(ValueError, match="curves=.*corpus 'complete' has no answers"):
        RunRecord.from_json(record_with([0.5] * 3, plays).to_json())


@pytest.mark.parametrize("device", ["toy", "another"])
def test_another_accuracy_is_another_run(device):
    other = record_with([0.5, 0.5, 0.9])
    other = dataclasses.replace(other, environment={**other.environment, "device": device})
    assert judge(record_with([0.5, 0.5, 0.9]), other, 0.02).agrees
    assert judge(record_with([0.5, 0.5, 0.89]), other, 0.02).agrees == (device == "another")
    verdict = judge(record_with([0.5, 0.5, 0.8]), other, 0.02)
    assert not verdict.agrees and "val_accuracy" in verdict.text


@pytest.mark.needs("pandas")
@pytest.mark.needs("scipy")
def test_tables_have_accuracy_and_how_many_solved_the_task(tmp_path):
    from localgpt_core.report.runs import run_frame, run_table
    from localgpt_core.report.tables import arm_frame, arm_table, suite_runs

    sizes = json.dumps(SIZES).replace(":", " =").replace('"', "")
    (tmp_path / "s.toml").write_text(
        f'question = "?"\npreset = "tiny"\nseeds = [1, 2, 3]\nmodel = {sizes}\n[arms.bp]\n[arms.fa]\n'
        'model = { method = "fa" }\n'
    )
    suite, last = read_suite(tmp_path / "s.toml"), {1: 0.94, 2: 0.96, 3: 1.0}
    records = {}
    for run in suite.plan(sixes()):
        accuracies = [0.25] * 3 + [last[run.spec.seed]]
        own = record_with(accuracies, run.spec) if run.arm.name == "bp" else toy_record(run.spec)
        records[own.digest] = dataclasses.replace(own, suite="s", arm=run.arm.name)
    runs = suite_runs(suite, records, sixes())
    frame = arm_frame(runs).set_index("arm")
    assert frame.loc["bp", "final_val_accuracy"] == pytest.approx((0.94 + 0.96 + 1.0) / 3)
    assert frame["solved"].tolist() == [2, 0]
    table = arm_table(runs).set_index("arm")
    assert (table.loc["bp", "accuracy"], table.loc["fa", "accuracy"]) == ("0.967", "-")
    whole = run_frame(records)
    assert whole["solved"].tolist() == [2, 0] and "accuracy" in run_table(whole)
    others = arm_frame(runs[runs["arm"] == "fa"])
    assert "solved" not in others and "final_val_accuracy" not in others

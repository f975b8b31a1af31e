"""What can be known is refused before the first step; what happens after the last one costs no run."""

import errno
import math
import signal

import numpy as np
import pytest
import torch
from toys import toy_corpus, toy_model, toy_text, toy_train

from localgpt_core.corpus.corpus import Corpus
from localgpt_core.training import before
from localgpt_core.training import state as run_state
from localgpt_core.training.before import check_corpus
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.loop import train
from localgpt_core.training.state import RunState


def corpus_of(text):
    return Corpus("toy", text, "".join(sorted(set(text))))


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(run_state, "training_step", lambda *args: pytest.fail("a step was taken"))


# Before the first step


def test_the_vectors_that_codes_can_be_fitted_to_are_counted_by_hand(no_step):
    # "ababab...": at each of 7 positions the characters so far are one of two.
    model = toy_model(vocab_size=2, vq_codes=15, vq_init="kmeans")
    message = "vq_codes=15: k-means has at most 14 different vectors of corpus 'toy' to fit them to"
    with pytest.raises(ValueError, match=message):
        train(model, toy_train(vq_start=10), corpus_of("ab" * 100))
    check_corpus(toy_model(vocab_size=2, vq_codes=14, vq_init="kmeans"), toy_train(), corpus_of("ab" * 100))


@pytest.mark.parametrize(("shared", "at", "most"), [(True, "", 42), (True, "0,2", 28), (False, "", 14)])
def test_a_shared_codebook_has_the_vectors_of_every_block(shared, at, most):
    options = {"vocab_size": 2, "n_layer": 3, "vq_init": "kmeans", "vq_shared": shared, "bottleneck_at": at}
    check_corpus(toy_model(vq_codes=most, **options), toy_train(), corpus_of("ab" * 100))
    with pytest.raises(ValueError, match=f"at most {most} different vectors"):
        check_corpus(toy_model(vq_codes=most + 1, **options), toy_train(), corpus_of("ab" * 100))


def test_as_many_codes_as_vectors_train():
    model = toy_model(vocab_size=2, vq_codes=14, vq_init="kmeans")
    result = train(model, toy_train(vq_start=10, batch_size=40), corpus_of("ab" * 100), diagnose_every=5)
    assert result.status == "finished" and math.isfinite(result.final_val_loss)


@pytest.mark.parametrize("start", [0, 19])
def test_random_codes_need_no_vectors(start):
    model = toy_model(vocab_size=2, vq_codes=900)
    assert train(model, toy_train(vq_start=start), corpus_of("ab" * 100)).status == "finished"


def test_a_batch_that_no_memory_holds_is_not_refused_for_its_text(monkeypatch):
    monkeypatch.setattr(before, "batch", lambda *args, **sizes: np.empty(2**48))
    check_corpus(toy_model(vq_codes=5, vq_init="kmeans"), toy_train(), toy_corpus())


def test_numbers_that_the_draws_or_torch_cannot_hold_are_refused(no_step):
    with pytest.raises(ValueError, match=f"seed={2**64}: must be an integer of at least 0 and at most"):
        check_corpus(toy_model(), toy_train(seed=2**64), toy_corpus())
    check_corpus(toy_model(), toy_train(seed=2**64 - 1), toy_corpus())
    with pytest.raises(ValueError, match="threads=4097: must be an integer of at least 1 and at most 4096"):
        train(toy_model(), toy_train(), toy_corpus(), threads=4097)


@pytest.mark.parametrize("place", ["file/c", "folder", "x" * 256])
def test_a_checkpoint_that_cannot_be_written_is_refused(tmp_path, no_step, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"^checkpoint='{tmp_path / place}': "):
        train(toy_model(), toy_train(), toy_corpus(), checkpoint=tmp_path / place)


@pytest.mark.parametrize("text", ["a" * 90, toy_text(90)], ids=["one letter", "short"])
@pytest.mark.parametrize("options", [{}, {"vq_codes": 3, "vq_init": "kmeans"}, {"mlp_topk": 3}], ids=str)
def test_a_short_text_trains_and_is_diagnosed_in_every_step(text, options):
    corpus = corpus_of(text)
    model = toy_model(vocab_size=corpus.vocab_size, method="dfa", fa_grape=True, **options)
    config = toy_train(batch_size=200, anchor_interval=3)
    result = train(model, config, corpus, diagnose_every=1)
    assert result.status == "finished" and result.diagnostics["step"] == [*range(21)]


# From then on


def failing_saves(monkeypatch, at):
    """Let the disk be full when a checkpoint of one of the steps ``at`` is written."""
    usual = RunState.save

    def save(self, path):
        if self.step in at:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(self, path)

    monkeypatch.setattr(RunState, "save", save)


def test_a_full_disk_costs_checkpoints_and_no_run(tmp_path, monkeypatch):
    path = tmp_path / "c"
    expected = train(toy_model(), toy_train(), toy_corpus()).curves
    failing_saves(monkeypatch, {10, 20})
    with pytest.warns(UserWarning, match=f"checkpoint {path} of step .*0 is not written: .*No space"):
        result = train(toy_model(), toy_train(), toy_corpus(), checkpoint=path)
    assert result.status == "finished" and result.curves == expected
    assert load_checkpoint(path).progress["step"] == 15


def test_an_interrupted_run_without_its_checkpoint_is_an_error(tmp_path, monkeypatch):
    failing_saves(monkeypatch, {0})

    def press(measured):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(OSError, match="No space left"):
        train(toy_model(), toy_train(), toy_corpus(), checkpoint=tmp_path / "c", report=press)


@pytest.mark.parametrize("fails_at", [10, 20])
def test_diagnostics_that_fail_cost_no_run(monkeypatch, fails_at):
    usual = run_state.measure_into
    whole = train(toy_model(), toy_train(), toy_corpus(), diagnose_every=5)

    def measure(diagnostics, *others):
        usual(diagnostics, *others)
        if others[-1] == fails_at:
            raise RuntimeError("did not converge")

    monkeypatch.setattr(run_state, "measure_into", measure)
    with pytest.warns(UserWarning, match=f"no diagnostics at step {fails_at}: RuntimeError: did not conv"):
        result = train(toy_model(), toy_train(), toy_corpus(), diagnose_every=5)
    assert result.curves == whole.curves
    kept = [i for i, step in enumerate(whole.diagnostics["step"]) if step != fails_at]
    for name in ("step", "total_cosine", "rule_rms"):
        assert result.diagnostics[name] == [whole.diagnostics[name][i] for i in kept]


def test_diagnostics_that_fail_before_the_first_step_end_the_run(monkeypatch, no_step):
    def measure(*args):
        raise RuntimeError("did not converge")

    monkeypatch.setattr(run_state, "measure_into", measure)
    with pytest.raises(RuntimeError, match="did not converge"):
        train(toy_model(), toy_train(), toy_corpus(), diagnose_every=5)


def test_ctrl_c_after_the_last_step_is_known_and_stops_nothing():
    def press_at_the_end(measured):
        if measured["step"] == 20 and "val_loss" in measured:
            signal.raise_signal(signal.SIGINT)

    result = train(toy_model(), toy_train(), toy_corpus(), report=press_at_the_end)
    assert (result.status, result.interrupted) == ("finished", True)
    assert not train(toy_model(), toy_train(), toy_corpus()).interrupted


def test_ctrl_c_while_the_last_checkpoint_is_written_loses_neither(tmp_path, monkeypatch):
    usual, saved = RunState.save, []

    def save(self, path):
        saved.append(self.step)
        if saved == [20, 20]:
            signal.raise_signal(signal.SIGINT)
        usual(self, path)

    monkeypatch.setattr(RunState, "save", save)
    config = toy_train(eval_interval=20)
    result = train(toy_model(), config, toy_corpus(), checkpoint=tmp_path / "c")
    assert saved == [20, 20] and (result.status, result.interrupted) == ("finished", True)
    assert load_checkpoint(tmp_path / "c").progress["step"] == 20


def test_the_optimiser_of_a_checkpoint_has_the_shapes_of_its_model(tmp_path):
    import safetensors.torch
    from safetensors import safe_open

    path = tmp_path / "c"
    train(toy_model(), toy_train(), toy_corpus(), checkpoint=path)
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["sha256"]
    tensors["optimizer.head.weight.exp_avg"] = torch.zeros(2, 3)
    safetensors.torch.save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=r"is damaged: optimizer.head.weight.exp_avg='float32 \(2, 3\)'"):
        train(toy_model(), toy_train(), toy_corpus(), checkpoint=path, resume=True)

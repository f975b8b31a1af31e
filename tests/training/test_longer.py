"""A finished run that is made longer is, to the last bit, the run that was longer from the start."""

from dataclasses import replace

import pytest
import torch
from toys import toy_corpus, toy_model, toy_train

from localgpt_core.training import curves
from localgpt_core.training.checkpoints import lengthened, load_checkpoint
from localgpt_core.training.loop import train

MODEL = toy_model(method="kp", dropout=0.1, fa_grape=True)


def constant(steps, **options):
    return toy_train(steps=steps, lr=1e-2, warmup=4, min_lr_ratio=1.0, **{"eval_interval": 5} | options)


@pytest.mark.parametrize("points", [100, 6, 4])  # a point every step; every 1 and 3; every 2 and 5
@pytest.mark.parametrize("short", [5, 8, 11])
def test_a_run_made_longer_is_the_run_that_was_longer_from_the_start(tmp_path, monkeypatch, points, short):
    monkeypatch.setattr(curves, "CURVE_POINTS", points)
    corpus, long = toy_corpus(), constant(20, anchor_interval=4)
    whole = train(MODEL, long, corpus, checkpoint=tmp_path / "whole", diagnose_every=4)
    train(MODEL, constant(short, anchor_interval=4), corpus, checkpoint=tmp_path / "short", diagnose_every=4)
    lengthened(load_checkpoint(tmp_path / "short"), 20, tmp_path / "longer").write()
    found = train(MODEL, long, corpus, checkpoint=tmp_path / "longer", resume=True, diagnose_every=4)
    assert found.curves == whole.curves and found.diagnostics == whole.diagnostics
    assert (found.steps_done, found.anchor_steps) == (whole.steps_done, whole.anchor_steps)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
    ends = [load_checkpoint(tmp_path / name) for name in ("whole", "longer")]
    assert ends[0].progress["losses"] == ends[1].progress["losses"] and len(ends[0].progress["losses"]) == 20
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(torch.equal(tensor, ends[1].tensors[name]) for name, tensor in ends[0].tensors.items())


@pytest.mark.parametrize("short", [5, 8])
def test_the_whole_evaluation_at_the_old_end_gives_way_to_that_of_a_longer_run(tmp_path, short):
    corpus, options = toy_corpus(), {"eval_between": 1}
    whole = train(MODEL, constant(20, **options), corpus)
    ended = train(MODEL, constant(short, **options), corpus, checkpoint=tmp_path / "short")
    assert ended.final_val_loss not in whole.curves["val_loss"]
    lengthened(load_checkpoint(tmp_path / "short"), 20, tmp_path / "longer").write()
    found = train(MODEL, constant(20, **options), corpus, checkpoint=tmp_path / "longer", resume=True)
    assert found.curves == whole.curves and found.best_val_loss == whole.best_val_loss


def test_what_was_made_longer_can_be_made_longer_again(tmp_path):
    corpus = toy_corpus()
    whole = train(MODEL, constant(12), corpus)
    train(MODEL, constant(3), corpus, checkpoint=tmp_path / "3")
    for before, after in ((3, 7), (7, 12)):
        lengthened(load_checkpoint(tmp_path / f"{before}"), after, tmp_path / f"{after}").write()
        found = train(MODEL, constant(after), corpus, checkpoint=tmp_path / f"{after}", resume=True)
    assert found.curves == whole.curves


def checkpoint_of(tmp_path, config):
    train(MODEL, config, toy_corpus(), checkpoint=tmp_path / "short")
    return load_checkpoint(tmp_path / "short")


def test_a_schedule_that_has_decayed_is_refused_with_both_rates(tmp_path):
    finished = checkpoint_of(tmp_path, replace(constant(8), min_lr_ratio=0.1))
    # At step 7, after 4 of warm-up: 1e-2 (0.1 + 0.9 (1 + cos(pi 3/4)) / 2), of 20 steps (1 + cos(pi 3/16)).
    with pytest.raises(
        ValueError, match=r"steps=20: .*short, .* to 0\.0023 where that of 20 steps is 0\.0092;"
    ):
        lengthened(finished, 20, tmp_path / "longer")
    assert "min_lr_ratio=1" in str(pytest.raises(ValueError, lengthened, finished, 9, tmp_path / "l").value)
    assert not (tmp_path / "longer").exists()


def test_a_run_within_its_warm_up_has_not_decayed(tmp_path):
    finished = checkpoint_of(tmp_path, replace(constant(3), min_lr_ratio=0.1))
    found = lengthened(finished, 20, tmp_path / "longer")
    assert found.train_config == replace(constant(20), min_lr_ratio=0.1)


@pytest.mark.parametrize("steps", [7, 8])
def test_a_longer_run_has_more_steps(tmp_path, steps):
    with pytest.raises(ValueError, match=f"steps={steps}: must be more than the 8 of"):
        lengthened(checkpoint_of(tmp_path, constant(8)), steps, tmp_path / "longer")


def test_a_checkpoint_that_has_no_losses_is_refused(tmp_path):
    finished = checkpoint_of(tmp_path, constant(8))
    finished.progress.pop("losses")
    finished.write()
    assert load_checkpoint(finished.path).progress["losses"] == []
    with pytest.raises(ValueError, match="does not hold the loss of every step"):
        lengthened(load_checkpoint(finished.path), 20, tmp_path / "longer")

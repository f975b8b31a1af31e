"""A batch in parts, one after the other, gives the run that it gives in one piece."""

from functools import cache, partial

import pytest
import torch
from part_cases import CASES, RUN, TOLERANCE, assert_same, difference, losses, made, stopping_at
from toys import toy_corpus, toy_model, toy_spec, toy_train

from localgpt_core import LocalGPT, TrainConfig
from localgpt_core.experiments import execute, judge
from localgpt_core.measure.cost import peak_step_bytes
from localgpt_core.parallel import Processes, Split
from localgpt_core.training.settings import RunSettings
from localgpt_core.training.step import build_model, build_optimizer, training_step


@cache
def whole(case):
    return made(*CASES[case])


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_accumulated_batches_give_the_same_run(case, accumulate):
    result = made(*CASES[case], accumulate=accumulate)
    assert_same(whole(case), result)


def test_the_cases_differ_and_see_a_small_change():
    curves = [losses(whole(case)) for case in CASES]
    assert len({tuple(curve.tolist()) for curve in curves}) == len(CASES)
    other = made({"method": "bp"}, {"lr": RUN["lr"] * (1 + 1e-9)})
    assert difference(whole("bp"), other) > TOLERANCE


@pytest.mark.parametrize("count, accumulate, rows", [(1, 1, 4), (1, 4, 4), (2, 2, 8), (3, 2, 4), (2, 3, 1)])
def test_the_parts_of_all_processes_are_every_row_once_and_in_order(count, accumulate, rows):
    found = []
    for rank in range(count):
        processes = Processes()
        processes.rank, processes.count = rank, count
        parts = [*Split(processes, accumulate).parts(rows)]
        assert len(parts) == accumulate and {part.of for part in parts} == {rows}
        for part in parts:
            own = [*range(rows)][part.rows]
            assert part.places is None or part.places.tolist() == own
            found += own
    assert found == [*range(rows)]


def test_a_part_that_is_the_whole_says_so():
    assert [part.is_whole for part in Split().parts(4)] == [True]
    assert [part.is_whole for part in Split(accumulate=2).parts(4)] == [False, False]


def test_a_batch_without_equal_parts_is_refused():
    with pytest.raises(ValueError, match="batch_size=4: must be a multiple of 3, for 1 processes"):
        made({}, {}, accumulate=3)


@pytest.mark.parametrize("accumulate", [0, 1.5, True])
def test_a_number_of_parts_that_is_none_is_refused(accumulate):
    with pytest.raises(ValueError, match="accumulate="):
        RunSettings(accumulate=accumulate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_drops_what_its_rows_drop_in_the_whole(dtype):
    model = LocalGPT(toy_model(dropout=0.4), dtype=dtype)
    x = torch.randn(6, 5, 7, dtype=dtype)
    torch.manual_seed(3)
    dropped = model.dropout(x)
    assert 0 < (dropped == 0).sum() < x.numel()
    for part in Split(accumulate=3).parts(6):
        torch.manual_seed(3)
        model.part = part
        assert torch.equal(model.dropout(x[part.rows]), dropped[part.rows])
    model.eval()
    assert model.dropout(x) is x


def test_targets_that_do_not_count_weigh_nothing():
    # One row of the batch has a single target, another has them all: a mean of the means would be wrong.
    config = TrainConfig(**RUN)
    idx = torch.arange(28).view(4, 7) % 5
    targets = idx.flip(1).clone()
    targets[0, 1:] = -100
    found = []
    for split in (Split(), Split(accumulate=4)):
        model = build_model(toy_model(), config)
        optimizer = build_optimizer(model, config)
        steps = [training_step(model, optimizer, config, idx, targets, step, split) for step in range(2)]
        found.append(torch.stack(steps))
    assert torch.allclose(*found, rtol=TOLERANCE, atol=0)


def test_parts_take_less_memory():
    config, sizes = toy_train(batch_size=16), {"n_embd": 32, "block_size": 32}
    peaks = []
    for split in (Split(), Split(accumulate=8)):
        model = build_model(toy_model(**sizes), config)
        optimizer = build_optimizer(model, config)
        idx = torch.zeros(16, 32, dtype=torch.long)
        training_step(model, optimizer, config, idx, idx, 0, split)  # the optimiser's own state is there now
        peaks.append(peak_step_bytes(partial(training_step, model, optimizer, config, idx, idx, 1, split)))
    assert peaks[1] < peaks[0] / 3


def test_a_checkpoint_goes_on_in_another_number_of_parts(tmp_path):
    path, changes = tmp_path / "run.safetensors", {"steps": 6}
    uninterrupted = made({"method": "kp"}, changes)
    for accumulate, last in ((2, 3), (4, 6)):
        settings = {"checkpoint": path, "resume": True, "report": stopping_at(last)}
        result = made({"method": "kp"}, changes, accumulate=accumulate, **settings)
        assert result.steps_done == last
    assert_same(uninterrupted, result)


def test_parts_are_noted_and_are_no_part_of_what_a_run_is():
    spec = toy_spec()
    one, several = (execute(spec, toy_corpus(), accumulate=n)[0] for n in (1, 3))
    assert one.digest == several.digest == spec.digest
    assert "accumulate" not in one.environment
    assert (several.environment["accumulate"], several.environment["processes"]) == (3, 1)
    assert "another accumulate" in judge(one, several, 0.01).text

import dataclasses
from pathlib import Path

import pytest
from toys import toy_record, toy_spec, toy_train

from localgpt_core.evidence import RatesTried, rates_by_setting, setting_of

BOOK = Path(__file__).parents[2] / "book"


def run(lr, loss, seed=1, model=None, **train):
    spec = dataclasses.replace(toy_spec(seed, **(model or {})), train=toy_train(lr=lr, seed=seed, **train))
    return toy_record(spec, final_val_loss=loss, status="diverged" if loss is None else "finished")


def test_a_search_is_of_runs_that_differ_in_rate_and_seed_alone():
    records = [
        run(1e-3, 2.5),
        run(3e-3, 2.25, eval_interval=20),  # evaluated less often on its way
        run(1e-2, None),
        run(3e-3, 2.4, seed=2, eval_between=1),
        run(1e-3, 2.3, seed=2),
        run(1e-1, 1.0, weight_decay=0.5),
        run(1e-1, 1.0, eval_iters=1),
        run(1e-1, 1.0, model={"method": "fa"}),
    ]
    found = rates_by_setting(records)
    search = found[setting_of(records[0].run_spec)]
    assert len(found) == 4  # another decay, another last evaluation, another rule
    assert search.losses == {1: {1e-3: 2.5, 3e-3: 2.25, 1e-2: float("inf")}, 2: {1e-3: 2.3, 3e-3: 2.4}}
    assert (search.best(1), search.best(2)) == (3e-3, 1e-3)
    assert search.searched == [1] and search.inside(1)
    assert not search.inside(2) and not search.inside(3)


@pytest.mark.parametrize("losses", [(2.0, 2.1, 2.2), (2.2, 2.1, 2.0), (2.0, 2.1)])
def test_a_rate_at_the_edge_is_not_inside(losses):
    records = [run(rate, loss) for rate, loss in zip((1e-3, 3e-3, 1e-2), losses, strict=False)]
    (tried,) = rates_by_setting(records).values()
    assert not tried.inside(1) and not RatesTried({}).inside(1)

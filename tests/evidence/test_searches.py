import dataclasses
from pathlib import Path

import pytest
from toys import toy_record, toy_spec, toy_train

from localgpt_core import load_corpus
from localgpt_core.evidence import RatesTried, rates_by_setting, setting_of
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records

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


@pytest.fixture(scope="module")
def searched():
    records = [r for r in load_records(BOOK / "records").values() if r.device_type == "cpu"]
    return rates_by_setting(records)


def unrounded(spec):
    """Return ``spec`` without a change of basis that is there for its rounding alone."""
    same = spec.model.subspace_rank == spec.model.n_embd
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, subspace_rank=0)) if same else spec


@pytest.mark.parametrize("name", ["rules", "claims"])
def test_no_rule_that_the_book_compares_has_its_best_rate_at_an_edge(name, searched):
    plan = read_suite(BOOK / "suites" / f"{name}.toml").plan(load_corpus())
    first = {planned.arm.name: unrounded(planned.spec) for planned in plan if planned.spec.train.seed == 1}
    assert len(first) > 10
    for arm, spec in first.items():
        tried = searched.get(setting_of(spec), RatesTried({}))
        assert tried.inside(1), f"{arm}: {tried.losses}"
        assert tried.best(1) == spec.train.lr, f"{arm}: {tried.losses}"

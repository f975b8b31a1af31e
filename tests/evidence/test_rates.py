import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import toy_record, toy_spec, toy_train

from localgpt_core.corpus.corpus import SHA256
from localgpt_core.evidence import search_of
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records

BOOK = Path(__file__).parents[2] / "book"
PLAYS = {name: SimpleNamespace(name=name, vocab_size=65, sha256=SHA256[name]) for name in SHA256}


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
    search = search_of(records[0].run_spec, records)
    assert search.losses == {1: {1e-3: 2.5, 3e-3: 2.25, 1e-2: float("inf")}, 2: {1e-3: 2.3, 3e-3: 2.4}}
    assert (search.best(1), search.best(2)) == (3e-3, 1e-3)
    assert search.searched == [1] and search.inside(1)
    assert not search.inside(2) and not search.inside(3)


@pytest.mark.parametrize("losses", [(2.0, 2.1, 2.2), (2.2, 2.1, 2.0), (2.0, 2.1)])
def test_a_rate_at_the_edge_is_not_inside(losses):
    records = [run(rate, loss) for rate, loss in zip((1e-3, 3e-3, 1e-2), losses, strict=False)]
    assert not search_of(records[0].run_spec, records).inside(1)


@pytest.mark.parametrize("suite", ["rules", "claims"])
def test_no_rule_that_the_book_compares_has_its_best_rate_at_an_edge(suite):
    """Backprop in another basis is backprop: its rates are those of backprop."""
    plan = read_suite(BOOK / "suites" / f"{suite}.toml")
    records = [r for r in load_records(BOOK / "records").values() if r.device_type == "cpu"]
    problems = []
    specs = {run.arm.name: run.spec for run in plan.plan(PLAYS[plan.corpus])}
    for name, spec in specs.items():
        if spec.model.subspace_rank == spec.model.n_embd:
            spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, subspace_rank=0))
        search = search_of(spec, records)
        best = {search.best(seed) for seed in search.searched}
        if not best or not all(search.inside(seed) for seed in search.searched):
            problems.append(f"{name}: {search.losses}")
        elif spec.train.lr not in best:
            problems.append(f"{name} is trained at {spec.train.lr}, and best at {best}")
    assert problems == []

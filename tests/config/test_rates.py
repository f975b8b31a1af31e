"""The learning rates that a run takes by default are those that the recorded search found."""

from dataclasses import asdict

import pytest

from localgpt_core.config import preset
from localgpt_core.config.rates import SEARCHED, recorded_rate
from localgpt_core.report.results import load_results


@pytest.mark.parametrize("name", SEARCHED)
def test_every_rate_is_the_best_of_its_search(name):
    suite, searched = SEARCHED[name]
    losses = {}
    results = load_results(suite)
    for record in map(results.records.get, results.runs["digest"]):
        assert record.preset == name and record.status == "finished"
        spec = record.run_spec
        run = asdict(spec.model) | asdict(spec.train)
        found = [i for i, (fields, _) in enumerate(searched) if fields.items() <= run.items()]
        losses.setdefault(found[-1], {}).setdefault(spec.train.lr, []).append(record.final_val_loss)
    assert sorted(losses) == [*range(len(searched))]
    for i, (fields, lr) in enumerate(searched):
        assert len(losses[i]) >= 3
        assert min(losses[i], key=lambda rate: sum(losses[i][rate]) / len(losses[i][rate])) == lr, fields


def test_the_most_special_search_counts_and_without_one_the_presets_own_rate():
    block = {"method": "dfa", "dfa_granularity": "block", "dfa_norm": True}
    model, train = preset("cpu", block | {"bias": True})
    assert "dfa_norm=True at preset cpu" in recorded_rate("cpu", model, train).source
    model, train = preset("gpu", {"method": "fa"}, {"lr": 5e-4})
    found = recorded_rate("gpu", model, train)
    assert found.lr == 5e-4 and found.source.startswith("preset gpu's own")

"""Two processes make the run that one makes, lead and follow, and end together.

The first of the two is the one that runs the tests; the other is started once, and follows.
"""

from functools import cache

import pytest
from part_cases import CASES, assert_same, made, stopping_at, two_processes

from localgpt_core.training import RunSettings


@pytest.fixture(scope="module")
def group():
    with two_processes() as (group, follower):
        yield group
        group.end()
        assert follower.wait(timeout=60) == 0


@cache
def alone(case):
    return made(*CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_run_of_one(group, case):
    result = made(*CASES[case], processes=group)
    assert_same(alone(case), result)


def test_each_process_may_take_its_share_in_parts(group):
    result = made(*CASES["dropout"], processes=group, accumulate=2)
    assert_same(alone("dropout"), result)


def test_a_checkpoint_goes_on_with_another_number_of_processes(group, tmp_path):
    path, changes = tmp_path / "run.safetensors", {"steps": 7}
    for settings, last in (({"processes": group}, 2), ({}, 4), ({"processes": group}, 7)):
        on = {"checkpoint": path, "resume": True, "report": stopping_at(last)}
        result = made({"method": "kp", "fa_grape": True}, changes, **settings, **on)
        assert result.steps_done == last
    assert_same(made({"method": "kp", "fa_grape": True}, changes), result)


def test_the_first_process_alone_measures_and_reports(group):
    reported = []
    result = made(*CASES["fa"], processes=group, diagnose_every=2, report=reported.append)
    assert result.diagnostics == made(*CASES["fa"], diagnose_every=2).diagnostics
    assert [measured["step"] for measured in reported if "val_loss" in measured] == [0, 3, 5]


def test_what_is_refused_leaves_the_processes_together(group, tmp_path):
    path = tmp_path / "run.safetensors"
    made({"method": "fa"}, {}, checkpoint=path)
    with pytest.raises(ValueError, match="is of another run"):
        made({"method": "bp"}, {}, checkpoint=path, resume=True, processes=group)
    with pytest.raises(ValueError, match="batch_size=3: must be a multiple of 2, for 2 processes"):
        made({}, {"batch_size": 3}, processes=group)
    with pytest.raises(ValueError, match="device='cuda:0'|this machine has 0 CUDA devices"):
        RunSettings(device="cuda:0", processes=group).prepare()
    assert_same(alone("bp"), made(*CASES["bp"], processes=group))

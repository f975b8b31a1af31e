"""What fails in one of several processes ends all of them, with one line and without waiting."""

import time

import pytest
from part_cases import CASES, RUN, made, two_processes
from toys import toy_corpus, toy_model, toy_train

from localgpt_core.experiments import execute
from localgpt_core.parallel import ProcessLost
from localgpt_core.records.specs import RunSpec

# A process that follows until the second step, and fails there by itself.
FAIL = """if True:
    from localgpt_core.parallel import launched
    from localgpt_core.training import follow, state
    def failing(*args, step=state.training_step):
        return step(*args) if args[5] == 0 else 1 / 0
    state.training_step = failing
    follow(launched())"""

SOON = 60.0  # seconds, of the ten minutes that a process would be waited for


def test_a_process_that_is_killed_ends_the_run():
    with two_processes() as (group, follower):

        def kill(measured):
            if measured["step"] == 2:
                follower.kill()

        began = time.monotonic()
        with pytest.raises(ProcessLost, match="another process of this run ended"):
            made(*CASES["fa"], processes=group, report=kill)
        assert time.monotonic() - began < SOON
        with pytest.raises(ProcessLost, match="a run has failed"):
            made(*CASES["fa"], processes=group)


def test_a_process_that_fails_ends_the_run_and_no_record_says_that_this_one_did():
    corpus = toy_corpus()
    spec = RunSpec(toy_model(), toy_train(**RUN), corpus.name, corpus.sha256)
    with two_processes(FAIL) as (group, follower):
        with pytest.raises(ProcessLost):
            execute(spec, corpus, processes=group)
        assert "ZeroDivisionError" in follower.communicate(timeout=SOON)[1]
        assert follower.returncode == 1


def test_where_the_first_process_fails_the_others_end():
    with two_processes() as (group, follower):

        def fail(measured):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            made(*CASES["fa"], processes=group, report=fail)
        assert "ProcessLost" in follower.communicate(timeout=SOON)[1]
        assert follower.returncode == 1

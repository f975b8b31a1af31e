"""Tasks in queues, against times worked out by hand."""

from graphlib import CycleError

import pytest

from localgpt_core.pipelines.events import Task, most_at_once, play


def test_a_queue_does_one_task_after_the_other():
    queues = {"a": [Task("x", 2.0), Task("y", 3.0)], "b": [Task("z", 1.0)]}
    assert play(queues) == {"x": (0, 2), "y": (2, 5), "z": (0, 1)}


def test_a_task_waits_for_others_and_for_their_lag_but_its_queue_does_not():
    queues = {
        "link": [Task("x", 2.0, lag=10.0), Task("y", 3.0, lag=10.0)],
        "stage": [Task("first", 1.0, after=("x",)), Task("second", 1.0, after=("y",))],
    }
    assert play(queues) == {"x": (0, 2), "y": (2, 5), "first": (12, 13), "second": (15, 16)}


def test_a_task_in_front_holds_up_one_that_could_begin():
    queues = {"a": [Task("late", 1.0, after=("z",)), Task("ready", 1.0)], "b": [Task("z", 4.0)]}
    assert play(queues)["ready"] == (5, 6)


def test_the_last_of_those_that_are_waited_for_counts():
    queues = {1: [Task("x", 5.0)], 2: [Task("y", 3.0, lag=4.0)], 3: [Task("z", 1.0, after=("x", "y"))]}
    assert play(queues)["z"] == (7, 8)


def test_tasks_that_wait_for_each_other_are_an_error():
    with pytest.raises(CycleError):
        play({1: [Task("x", 1.0, after=("y",))], 2: [Task("y", 1.0, after=("x",))]})
    with pytest.raises(CycleError):  # behind what waits for it
        play({1: [Task("x", 1.0, after=("y",)), Task("y", 1.0)]})


@pytest.mark.parametrize(
    ("spans", "most"),
    [
        ([], 0),
        ([(0, 1)], 1),
        ([(0, 1), (1, 2)], 1),  # one ends before another starts
        ([(0, 2), (1, 3), (2, 4)], 2),
        ([(0, 9), (1, 2), (3, 4), (3.5, 5)], 3),
    ],
)
def test_overlapping_spans_are_counted(spans, most):
    assert most_at_once(spans) == most

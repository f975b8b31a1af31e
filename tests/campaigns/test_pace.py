"""How many processes are fastest: by times that are made up, and with a real training."""

import math

import pytest
from toys import toy_corpus, toy_spec

from localgpt_core.campaigns.pace import Pace, measured_pace, read_pace, steppers


@pytest.mark.parametrize(
    ("together", "jobs"),
    [
        ([10.0, 19.0, 27.0], 3),
        ([10.0, 18.0, 17.0], 2),
        ([10.0, 9.0, 8.0], 1),
        ([10.0, 10.4, 10.8], 3),  # by 4 % each no gain, by 8 % in all one
        ([10.0, 10.4, 10.3], 1),
        ([10.0, 0.0], 1),
        ([0.0], 1),
    ],
)
def test_the_fastest_number_is_taken_and_of_equals_the_smallest(together, jobs):
    asked = []

    def steps(number):
        asked.append(number)
        return together[number - 1]

    pace = measured_pace("toy", "tiny", 3, steps, 7.0)
    assert pace == Pace("toy", "tiny", tuple(together), 7.0) and pace.jobs == jobs
    assert asked == [*range(1, len(together) + 1)]  # none is tried after one that does not fit


def test_a_step_of_one_process_takes_as_long_as_the_others_let_it():
    pace = Pace("toy", "tiny", (10.0, 16.0, 0.0), 7.0)
    assert (pace.seconds_per_step(1), pace.seconds_per_step(2)) == (0.1, 0.125)
    assert pace.seconds_per_step(3) == pace.seconds_per_step(4) == math.inf


def test_a_pace_is_kept_for_its_device_and_preset(tmp_path):
    path, pace = tmp_path / "pace.json", Pace("toy", "tiny", (10.0, 16.0), 7.0)
    assert read_pace(path, "toy", "tiny") is None
    pace.write(path)
    assert read_pace(path, "toy", "tiny") == pace
    assert read_pace(path, "other", "tiny") is None and read_pace(path, "toy", "cpu") is None
    for damaged in ("", "[]", '{"device": "toy"}', path.read_text().replace("10.0", '"x"')):
        path.write_text(damaged)
        assert read_pace(path, "toy", "tiny") is None


def test_processes_really_step_alone_and_together():
    with steppers(2, toy_spec(), toy_corpus(), "cpu", 1, seconds=0.05) as steps:
        assert steps(1) > 0 and steps(2) > 0


def test_a_process_that_cannot_train_is_a_pace_of_0():
    larger = toy_spec(vocab_size=toy_corpus().vocab_size - 3)  # its text has symbols that the model lacks
    with steppers(1, larger, toy_corpus(), "cpu", 1, seconds=0.05) as steps:
        assert steps(1) == 0.0

import dataclasses
import math

import pytest
from toys import toy_record, toy_spec

from localgpt_core.evidence import Noise, ends, rounding_noise
from localgpt_core.evidence.intervals import lies


def run(loss, seed=1, **model):
    spec = dataclasses.replace(toy_spec(seed, **model))
    status = "finished" if loss is not None else "diverged"
    return toy_record(spec, final_val_loss=loss, status=status)


def test_the_noise_is_that_of_the_runs_that_are_one_run_by_hand():
    """Differences of 0.03 and -0.01: s^2 = (9 + 1) / 2 / 10^4, and t of two degrees of freedom is 4.3027."""
    records = [run(2.0), run(2.03, subspace_rank=8), run(2.1, 2), run(2.09, 2, subspace_rank=8)]
    others = [
        run(3.0, subspace_rank=4),  # a smaller subspace is another model
        run(3.0, 3, subspace_rank=8),  # nothing to hold it against
        run(3.0, subspace_rank=8, subspace_mode="constrain"),  # its weights start otherwise
        run(3.0, method="fa"),
        run(None, 4),
        run(2.0, 4, subspace_rank=8),
    ]
    noise = rounding_noise(records + others)
    assert noise == Noise(pytest.approx(math.sqrt(5e-4)), 2)
    assert noise.floor(1) == pytest.approx(4.30265 * math.sqrt(5e-4), rel=1e-5)
    assert noise.floor(4) == pytest.approx(noise.floor(1) / 2) and math.isnan(noise.floor(0))
    assert rounding_noise(records[:2] + others) is None


def test_pairs_of_several_rules_count_alike():
    records = [run(2.0), run(2.02, subspace_rank=8)]
    records += [run(2.5, method="fa"), run(2.54, method="fa", subspace_rank=8)]
    assert rounding_noise(records) == Noise(pytest.approx(math.sqrt(1e-3)), 2)


@pytest.mark.parametrize(
    ("mean", "half", "floor", "verdict"),
    [
        (0.010, 0.012, 0.0, "not clearly apart"),
        (0.010, 0.010, 0.0, "not clearly apart"),
        (-0.010, 0.012, 0.0, "not clearly apart"),
        (0.010, 0.008, 0.0, "above"),
        (-0.010, 0.008, 0.0, "below"),
        (0.010, 0.008, 0.02, "open"),
        (-0.010, 0.008, 0.01, "open"),
        (-0.030, 0.008, 0.02, "below"),
        (0.030, 0.040, 0.02, "not clearly apart"),
    ],
)
def test_an_arm_ends_somewhere_only_beyond_its_interval_and_beyond_rounding(mean, half, floor, verdict):
    assert ends(mean, half, floor) == verdict


@pytest.mark.parametrize(
    ("mean", "half", "answer"),
    [
        (0.5, 0.4, True),
        (0.5, 0.5, None),
        (1.2, 0.1, False),
        (1.1, 0.1, False),
        (1.05, 0.1, None),
        (-1, 1, False),
    ],
)
def test_an_interval_lies_in_a_region_wholly_not_at_all_or_in_part(mean, half, answer):
    assert lies(mean, half, (0.0, 1.0)) is answer

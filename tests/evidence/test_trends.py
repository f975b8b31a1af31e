import math

import pytest

from localgpt_core.evidence import trend


def test_a_line_by_hand():
    """log2: 0, 1, 2. y: 1, 2, 4. Slope 3 / 2, residuals 1/6, -1/3, 1/6: s^2 = 1/6; t of 1: 12.7062."""
    found = trend([1, 2, 4], [1.0, 2.0, 4.0])
    assert (found.slope, found.start, found.n) == (pytest.approx(1.5), pytest.approx(5 / 6), 3)
    assert found.half == pytest.approx(12.7062 * math.sqrt(1 / 6 / 2), rel=1e-5)
    assert found.at(8) == pytest.approx(5 / 6 + 4.5) and found.verdict == "open"
    assert trend([1, 2, 4], [1.0, 2.0, 4.0], level=0.5).verdict == "grows"  # t of 1: 1
    assert trend([1, 2, 4], [-1.0, -2.0, -4.0], level=0.5).verdict == "shrinks"


def test_several_points_of_one_size_count_each():
    found = trend([1, 1, 4, 4], [0.0, 0.2, 1.0, 1.2])
    assert found.slope == pytest.approx(0.5)
    assert found.half == pytest.approx(4.302653 * math.sqrt(0.04 / 2 / 4), rel=1e-5)


@pytest.mark.parametrize("sizes", [[], [3], [3, 3, 3]])
def test_without_two_sizes_there_is_no_slope(sizes):
    found = trend(sizes, [0.5] * len(sizes))
    assert math.isnan(found.slope) and found.verdict == "open" and found.n == len(sizes)


def test_two_points_have_a_slope_and_no_interval():
    found = trend([2, 8], [1.0, 2.0])
    assert (found.slope, found.verdict) == (pytest.approx(0.5), "open") and math.isnan(found.half)


def test_what_has_no_logarithm_is_refused():
    with pytest.raises(ValueError, match=r"sizes=\[1, 0\]: must be positive"):
        trend([1, 0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"values=\[1.0\]: must be 2"):
        trend([1, 2], [1.0])

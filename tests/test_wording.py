import math

import pytest

from cifar_lightning.wording import count, counted, decimal, duration, percent, points, points_span, pvalue, span


def test_shares_and_differences():
    assert percent(0.12345) == "12.3 %"
    assert percent(1, 2) == "100.00 %"
    assert span((0.1, 0.256)) == "10.0 to 25.6 %"
    assert points(0.0123) == "+1.2"
    assert points(-0.0001) == "+0.0"
    assert points_span((-0.007, 0.019)) == "-0.7 to +1.9"


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_has_no_value_is_a_dash(nothing):
    assert percent(nothing) == decimal(nothing, 2) == duration(nothing) == "-"
    assert points(math.nan) == "-"


def test_counts_p_values_and_times():
    assert count(12345) == "12,345"
    assert [pvalue(p) for p in (None, 1e-300, 0.01234, 1.0)] == ["", "p < 0.0001", "p = 0.0123", "p = 1.0000"]
    assert [duration(seconds) for seconds in (12.4, 200, 7300)] == ["12 s", "3.3 min", "2.0 h"]
    assert [counted(number, "dog is", "dogs are") for number in (0, 1, 2)] == [
        "No dogs are",
        "One dog is",
        "2 dogs are",
    ]

"""The rate of false insights, on a small grid of the benchmark."""

import pytest

from benchmarks.accuracy import insight_rates


@pytest.mark.slow
@pytest.mark.parametrize("finding", insight_rates.FINDINGS)
def test_an_insight_is_false_in_at_most_5_percent_of_small_test_sets(finding):
    for row in insight_rates.rates([finding], sizes=(1, 8, 60), classes=(3, 10), num_draws=400):
        assert row["rate"] <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5, row

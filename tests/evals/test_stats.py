import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.evals.stats import Spread, mean, median, scored, spread, standard_error

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20)


def test_what_was_not_scored_does_not_count():
    values = [1.0, None, 3.0, math.nan]
    assert scored(values).tolist() == [1.0, 3.0]
    assert mean(values) == 2.0 and median(values) == 2.0
    assert standard_error(values) == standard_error([1.0, 3.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[], [None], [math.nan, None]])
def test_nothing_scored_is_none(values):
    assert (mean(values), median(values), standard_error(values), spread(values)) == (None,) * 4


def test_infinity_is_a_result():
    assert mean([1.0, math.inf]) == math.inf and median([1.0, 2.0, math.inf]) == 2.0
    assert standard_error([1.0, 2.0, math.inf]) is None


@given(NUMBERS)
def test_independent_values_have_the_textbook_error(values):
    expected = np.std(values, ddof=1) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(expected, abs=1e-9)
    assert standard_error(values, range(len(values))) == pytest.approx(expected, abs=1e-9)


@given(NUMBERS, st.integers(2, 5))
def test_copies_of_a_value_in_its_cluster_tell_nothing_new(values, copies):
    repeated = [value for value in values for _ in range(copies)]
    clusters = [cluster for cluster in range(len(values)) for _ in range(copies)]
    assert standard_error(repeated, clusters) == pytest.approx(standard_error(values), abs=1e-9)


def test_clusters_of_unequal_size():
    # Deviations from the mean 3 are -2, -1, 0 and 3; by cluster -3, 0 and 3: sqrt(3/2 * 18) / 4.
    assert standard_error([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"]) == pytest.approx(math.sqrt(27) / 4)


def test_the_cluster_of_what_was_not_scored_is_left_out():
    assert standard_error([1.0, None, 3.0], ["a", "b", "c"]) == pytest.approx(1.0)
    assert standard_error([1.0, None, math.nan], ["a", "b", "c"]) is None


@pytest.mark.parametrize(("values", "clusters"), [([5.0], None), ([1.0, 2.0, 3.0], ["a"] * 3)])
def test_one_independent_value_has_no_error(values, clusters):
    assert standard_error(values, clusters) is None


def test_one_cluster_per_value_is_asked_for():
    with pytest.raises(ValueError, match="one cluster per value, got 1 for 2"):
        standard_error([1.0, 2.0], ["a"])


def test_spread():
    found = spread([4.0, None, 1.0, 2.0, 3.0, 5.0])
    assert found == Spread(median=3.0, low=2.0, high=4.0, minimum=1.0, maximum=5.0, n=5)

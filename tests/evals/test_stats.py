import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.evals.stats import Spread, mean, median, paired_interval, scored, spread, standard_error

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


# -- paired differences ---------------------------------------------------------------------------------------------


def test_equal_differences_have_an_interval_of_no_width():
    assert paired_interval([0.25] * 6, range(6)) == (0.25, 0.25)
    assert paired_interval([0.0, 0.0], ["a", "b"]) == (0.0, 0.0)


@pytest.mark.parametrize(("differences", "clusters"), [([], []), ([1.0], ["a"]), ([1.0, 0.0, -1.0], ["a"] * 3)])
def test_one_cluster_has_no_interval(differences, clusters):
    assert paired_interval(differences, clusters) is None


def test_two_clusters_by_hand():
    """Drawn again, two clusters are both the first, both the second, or one of each; so are their means."""
    low, high = paired_interval([0.0, 1.0], ["a", "b"])
    assert (low, high) == (0.0, 1.0)
    # Draws with both: (0 + 3) / 4; the mean of clusters would be 0.5.
    assert paired_interval([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"], resamples=1, seed=3)[0] in (0.0, 0.75, 1.0)
    means = {paired_interval([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"], resamples=1, seed=s)[0] for s in range(40)}
    assert means == {0.0, 0.75, 1.0}


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=8, max_size=40))
def test_the_interval_holds_the_mean_and_nothing_that_was_not_there(differences):
    low, high = paired_interval(differences, range(len(differences)))
    assert min(differences) <= low <= np.mean(differences) + 1e-9 and np.mean(differences) - 1e-9 <= high
    assert high <= max(differences)
    mirrored = paired_interval([-d for d in differences], range(len(differences)))
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_the_same_seed_draws_the_same_interval():
    differences = np.random.default_rng(0).normal(size=30).tolist()
    assert paired_interval(differences, range(30)) == paired_interval(differences, range(30))
    assert paired_interval(differences, range(30)) != paired_interval(differences, range(30), seed=1)
    assert paired_interval(differences, range(30), seed=1) == pytest.approx(
        paired_interval(differences, range(30)), abs=0.1
    )


def test_its_width_is_that_of_a_normal_interval():
    differences = np.random.default_rng(1).normal(0.3, 1.0, 200).tolist()
    expected = [np.mean(differences) + sign * 1.96 * standard_error(differences) for sign in (-1, 1)]
    assert paired_interval(differences, range(200), resamples=20_000) == pytest.approx(expected, abs=0.01)


def test_clusters_are_drawn_whole():
    """Copies of a difference in its cluster tell nothing new; taken for independent they would."""
    once = np.random.default_rng(2).normal(size=20).tolist()
    copies = [difference for difference in once for _ in range(9)]
    clusters = [cluster for cluster in range(20) for _ in range(9)]
    assert paired_interval(copies, clusters) == pytest.approx(paired_interval(once, range(20)))
    alone = paired_interval(copies, range(180))
    whole = paired_interval(copies, clusters)
    assert whole[1] - whole[0] > 2 * (alone[1] - alone[0])


def test_the_order_in_a_cluster_does_not_matter():
    assert paired_interval([1.0, 0.0, 0.5], ["a", "b", "a"]) == paired_interval([0.5, 1.0, 0.0], ["a", "a", "b"])


def test_a_cluster_per_difference_is_asked_for():
    with pytest.raises(ValueError):
        paired_interval([1.0, 2.0], ["a"])

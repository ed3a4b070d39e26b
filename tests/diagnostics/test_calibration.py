"""How often tests reject and intervals hold the truth, on routings made for it; tools/calibrate_tests.py has more."""

import numpy as np
import pytest
import scipy.stats
from calibrate_tests import (
    PLAIN,
    Reader,
    Source,
    any_adjusted,
    any_cell,
    changed,
    covers,
    covers_beyond,
    holds,
    rejects,
    rejects_beyond,
)


def rate(trial, repetitions, seed=0):
    return sum(trial(np.random.default_rng([seed, repetition])) for repetition in range(repetitions))


def at_most(count, repetitions, share):
    """A count that a share would exceed less than once in a thousand."""
    return scipy.stats.binom.sf(count - 1, repetitions, share) > 1e-3


def at_least(count, repetitions, share):
    return scipy.stats.binom.cdf(count, repetitions, share) > 1e-3


@pytest.mark.parametrize(
    "sources, options",
    [
        ([Source(30), Source(30)], {}),
        ([Source(40, (8, 32), 5.0), Source(120, (64, 128), 100.0)], {}),
        ([Source(200, (16, 16), group=5)] * 2, {}),
        (PLAIN, {"are_shared": True}),
    ],
    ids=["thirty", "unequal", "groups", "groups in both"],
)
def test_no_difference_is_rarely_found(sources, options):
    assert at_most(rate(rejects(sources, **options), 100), 100, 0.07)


def test_groups_that_are_not_told_are_found():
    assert rate(rejects([Source(200, (16, 16), group=5)] * 2, tells=False), 20) > 10  # so that the claim above can fail


def test_a_planted_difference_is_found():
    assert at_least(rate(rejects(PLAIN, 0.2), 40), 40, 0.95)


@pytest.mark.parametrize(
    "reader", [Reader(tokens=128), Reader((30, 60), 128, distance=2.5, effect=0.3)], ids=["plain", "unequal"]
)
def test_the_token_alone_is_rarely_found_beyond_the_token(reader):
    assert at_most(rate(rejects_beyond(reader), 40), 40, 0.05)


def test_the_domain_is_found_beyond_the_token():
    assert at_least(rate(rejects_beyond(Reader(shift=0.15)), 10), 10, 0.9)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_intervals_hold_the_truth(shift):
    assert at_least(rate(covers(PLAIN, shift), 60), 60, 0.93)


def test_standardised_intervals_hold_the_truth():
    assert at_least(rate(covers_beyond(Reader(tokens=128, shift=0.2)), 20), 20, 0.93)


def test_intervals_of_changes_hold_the_truth():
    assert at_least(rate(changed(PLAIN, 0.1, 0.3, holds), 30), 30, 0.93)


@pytest.mark.parametrize("what", ["p", "layer_p"])
def test_adjusted_values_hold_for_all_together(what):
    assert at_most(rate(any_adjusted(3, 4, what), 40), 40, 0.07)


@pytest.mark.parametrize("domains, evenness", [(3, 3.0), (10, 0.3)], ids=["plain", "rare experts"])
def test_cells_hold_for_all_together(domains, evenness):
    assert at_most(rate(any_cell(domains, 32, evenness, Source(30)), 60), 60, 0.07)

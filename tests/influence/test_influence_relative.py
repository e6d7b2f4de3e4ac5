"""Relative influence: who is about the query is not who has the longest gradient."""

import numpy as np
import pytest

from finfluence.errors import InputError
from finfluence.influence import detection, relative_influence, squared_lengths


def test_the_median_length_keeps_its_mu_and_what_has_no_length_has_no_score():
    found = relative_influence([2.0, -3.0, 1.0, np.nan, 5.0], [4.0, 36.0, 1.0, 4.0, 0.0])
    np.testing.assert_allclose(found, [2.0, -1.0, 2.0, np.nan, np.nan])


def test_it_ranks_by_direction_where_lengths_differ():
    """Samples along the query's direction, among others that are mostly longer; exact for gradients drawn here."""
    generator = np.random.default_rng(0)
    gradients = generator.standard_normal((300, 40)) * generator.lognormal(0.0, 1.0, (300, 1))
    query = generator.standard_normal(40)
    planted = np.arange(300) < 20
    lengths = np.linalg.norm(gradients, axis=1)
    gradients[planted] += 0.5 * lengths[planted, None] * query / np.linalg.norm(query)
    mu, own = gradients @ query, (gradients**2).sum(1)
    cosine = mu / (np.sqrt(own) * np.linalg.norm(query))
    relative = relative_influence(mu, own)
    assert np.array_equal(np.argsort(relative), np.argsort(cosine))
    assert detection(relative, planted).average_precision > detection(mu, planted).average_precision + 0.3


def test_lengths_are_relative_to_each_period():
    """A period at a hundred times the learning rate says no more than another; a silent one says nothing."""
    found = squared_lengths(
        [0, 1, 0, 1, 0, 1], [-1.0, -3.0, -100.0, -300.0, 0.0, 0.0], period=[0, 0, 1, 1, 2, 2], n_samples=3
    )
    np.testing.assert_allclose(found, [1.0, 3.0, 0.0])


@pytest.mark.parametrize(
    ("mu", "own", "message"),
    [([1.0, 2.0], [1.0], "one of each a sample"), ([1.0, 2.0], [0.0, -1.0], "no sample has a positive")],
)
def test_bad_input(mu, own, message):
    with pytest.raises(InputError, match=message):
        relative_influence(mu, own)

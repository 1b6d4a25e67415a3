"""The bootstrap against its closed forms, its naive definition and its coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import InputError
from qjax.evaluate.bootstrap import interval, mean_interval, quantile_intervals, resample_counts


@given(st.integers(1, 20), st.integers(0, 2**31))
def test_every_resample_draws_as_many_sequences(sequences, seed):
    counts = resample_counts(sequences, 50, seed)
    assert counts.shape == (50, sequences) and (counts.sum(axis=1) == sequences).all() and (counts >= 0).all()


def test_counts_have_the_moments_of_the_multinomial():
    n = 8
    counts = resample_counts(n, 20_000, 0)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=4 * np.sqrt((1 - 1 / n) / 20_000))
    covariance = np.cov(counts.T)
    np.testing.assert_allclose(covariance, np.eye(n) - 1 / n, atol=0.05)


def test_seed_fixes_the_samples():
    np.testing.assert_array_equal(resample_counts(5, 9, 3), resample_counts(5, 9, 3))
    assert (resample_counts(5, 9, 3) != resample_counts(5, 9, 4)).any()


def test_interval_of_a_mean_is_the_normal_one():
    """For many sequences the percentile interval is `mean ± 1.96 · s / √n`."""
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 5))
    rows = values.mean(axis=1)
    low, high = mean_interval(values, resample_counts(400, 4000, 1))
    half = 1.959964 * rows.std() / np.sqrt(400)
    assert abs(low - (rows.mean() - half)) < 0.1 * half and abs(high - (rows.mean() + half)) < 0.1 * half


def test_interval_covers_the_truth_as_often_as_it_says():
    """95% nominal; with 30 sequences the percentile interval of a mean covers about 93.5%: within 4 standard errors."""
    rng, trials, hits = np.random.default_rng(0), 600, 0
    counts = resample_counts(30, 500, 0)
    for _ in range(trials):
        low, high = mean_interval(rng.normal(0, 1, (30, 1)), counts)
        hits += low <= 0 <= high
    assert abs(hits / trials - 0.935) < 4 * np.sqrt(0.935 * 0.065 / trials)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_quantiles_are_those_of_the_written_out_sample(sequences, positions, seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.exponential(size=(sequences, positions)), 1)  # with ties
    counts = resample_counts(sequences, 30, seed)
    probabilities = (0.0, 0.5, 0.99, 1.0)
    written = [np.quantile(np.repeat(values, count, axis=0), probabilities) for count in counts]
    expected = [interval(column) for column in np.transpose(written)]
    np.testing.assert_allclose(quantile_intervals(values, counts, probabilities), expected, atol=1e-12)


def test_means_are_those_of_the_written_out_sample():
    values = np.random.default_rng(5).normal(size=(7, 4))
    counts = resample_counts(7, 100, 2)
    written = np.array([np.exp(np.repeat(values, count, axis=0).mean()) for count in counts])
    np.testing.assert_allclose(mean_interval(values, counts, np.exp), interval(written), rtol=1e-12)


def test_one_sequence_has_an_interval_of_zero_width():
    counts = resample_counts(1, 10, 0)
    assert mean_interval(np.array([[1.0, 3.0]]), counts) == (2.0, 2.0)


def test_shapes_are_checked():
    with pytest.raises(InputError, match="bootstrap needs values"):
        mean_interval(np.zeros((3, 2)), resample_counts(4, 5, 0))
    with pytest.raises(InputError, match="bootstrap needs values"):
        quantile_intervals(np.zeros((0, 2)), resample_counts(1, 5, 0)[:, :0], (0.5,))

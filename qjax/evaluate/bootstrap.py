"""Percentile bootstrap over sequences: the uncertainty of a number from the choice of evaluation windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from qjax.errors import InputError

__all__ = ["interval", "mean_interval", "quantile_intervals", "resample_counts"]

RESAMPLES = 1000
LEVEL = 0.95

Interval = tuple[float, float]


def resample_counts(sequences: int, resamples: int, seed: int) -> Int[np.ndarray, "resamples sequences"]:
    """Occurrences of every sequence in each bootstrap sample: `sequences` draws with replacement.

    Computed from Philox words, so that a seed gives the same samples for every version of numpy.
    """
    words = np.random.Philox(seed).random_raw(resamples * sequences).reshape(resamples, sequences)
    # The upper 53 bits as a fraction: a bias of 2⁻⁵³ where a remainder would need rejection.
    draws = ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53 * sequences).astype(np.int64)
    counts = np.zeros((resamples, sequences), dtype=np.int64)
    np.add.at(counts, (np.arange(resamples)[:, None], draws), 1)
    return counts


def interval(statistics: Float[np.ndarray, " resamples"], level: float = LEVEL) -> Interval:
    """The central percentile interval of resampled statistics.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values: Shaped[np.ndarray, "sequences positions"],
    counts: Int[np.ndarray, "resamples drawn"],
    transform: Callable[[np.ndarray], np.ndarray] = lambda means: means,
) -> Interval:
    """Interval of `transform(mean of all values)`; all sequences have the same number of positions."""
    _check(values, counts)
    return interval(transform(counts @ values.mean(axis=1, dtype=np.float64) / counts.shape[1]))


def quantile_intervals(
    values: Shaped[np.ndarray, "sequences positions"],
    counts: Int[np.ndarray, "resamples drawn"],
    probabilities: Sequence[float],
) -> list[Interval]:
    """Intervals of quantiles over all values of a sample (linear interpolation, as `numpy.quantile`).

    The values are sorted once; a resample is a weighting of them, and its order statistics are places in the running
    sum of the weights.
    """
    _check(values, counts)
    order = np.argsort(values, axis=None, kind="stable")
    ranked = values.reshape(-1)[order].astype(np.float64)
    owner = order // values.shape[1]
    place = np.asarray(probabilities) * (values.size - 1)
    lower = np.floor(place).astype(np.int64)
    upper, fraction = np.minimum(lower + 1, values.size - 1), place - lower
    statistics = np.empty((len(counts), len(place)))
    for row, count in enumerate(counts):
        running = np.cumsum(count[owner])
        below, above = (ranked[np.searchsorted(running, rank, side="right")] for rank in (lower, upper))
        statistics[row] = below + fraction * (above - below)
    return [interval(column) for column in statistics.T]


def _check(values: np.ndarray, counts: np.ndarray) -> None:
    if values.ndim != 2 or values.size == 0 or counts.shape[1:] != values.shape[:1]:
        raise InputError(
            f"bootstrap needs values [sequences, positions] and counts [resamples, sequences]; "
            f"found {list(values.shape)} and {list(counts.shape)}"
        )

"""Closed-form distortion of scalar quantisers on a standard Gaussian, in float64 on the host."""

from __future__ import annotations

import functools
import math

import numpy as np

__all__ = ["distortion", "lloyd_max_levels", "optimal_rms"]

_erf = np.vectorize(math.erf, otypes=[float])


def _density(t: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * np.square(t)) / math.sqrt(2 * math.pi)


def _moments(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability and first moment of every level's nearest-neighbour cell under N(0, 1)."""
    inner = (levels[1:] + levels[:-1]) / 2
    edges = np.concatenate([[-40.0], inner, [40.0]])
    cumulative = 0.5 * (1 + _erf(edges / math.sqrt(2)))
    return np.diff(cumulative), -np.diff(_density(edges))


def distortion(levels: np.ndarray) -> float:
    """`E min_i (z − level_i)²` for z ~ N(0, 1) and ascending levels: `1 − 2 Σ l m₁ + Σ l² m₀`."""
    levels = np.asarray(levels, np.float64)
    probability, first = _moments(levels)
    return float(1 - 2 * np.sum(levels * first) + np.sum(np.square(levels) * probability))


def optimal_rms(levels: np.ndarray) -> float:
    """The input RMS ρ that minimises `distortion(levels / ρ)`, by golden section on log ρ."""
    levels = np.asarray(levels, np.float64)
    low, high = math.log(0.05 * np.max(np.abs(levels))), math.log(2.0 * np.max(np.abs(levels)))
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if distortion(levels / math.exp(left)) < distortion(levels / math.exp(right)):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def _centroid_jacobian(levels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """∂(l_i p_i − m_i)/∂l_j: tridiagonal, since a cell's edges are the midpoints t of neighbouring levels."""
    edge = (levels[1:] + levels[:-1]) / 2
    density = _density(edge)
    right, left = 0.5 * density * (levels[:-1] - edge), 0.5 * density * (levels[1:] - edge)
    jacobian = np.diag(probability) + np.diag(right, 1) - np.diag(left, -1)
    jacobian[np.arange(len(edge)), np.arange(len(edge))] += right
    jacobian[np.arange(1, len(levels)), np.arange(1, len(levels))] -= left
    return jacobian


@functools.cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The `2^bits` levels of the Lloyd–Max quantiser of N(0, 1): each level is the mean of its own cell.

    Starts from the asymptotically optimal companding law (point density ∝ density^(1/3)).
    """
    count = 2**bits
    # Quantiles of N(0, 3), whose density is proportional to that of N(0, 1) to the power 1/3.
    grid = np.linspace(-9 * math.sqrt(3), 9 * math.sqrt(3), 20_001)
    cdf = 0.5 * (1 + _erf(grid / math.sqrt(6)))
    levels = np.interp((np.arange(count) + 0.5) / count, cdf, grid)
    for _ in range(60):  # Lloyd's iteration, into the neighbourhood of the fixed point
        probability, first = _moments(levels)
        levels = first / probability
    for _ in range(40):  # Newton's, for l p(l) − m(l) = 0: Lloyd's alone needs tens of thousands of steps at 8 bits
        probability, first = _moments(levels)
        step = np.linalg.solve(_centroid_jacobian(levels, probability), levels * probability - first)
        levels = levels - step
        levels = (levels - levels[::-1]) / 2  # the quantiser is odd; keep it so exactly
        if np.max(np.abs(step)) < 1e-13:
            break
    return tuple(float(level) for level in levels)

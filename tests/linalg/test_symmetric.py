"""The lower triangle over the upper one."""

import numpy as np
import pytest

from qjax.linalg.symmetric import mirror


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 37, 172, 256, 257, 600])
def test_what_stands_above_the_diagonal_is_replaced(n, dtype):
    lower = np.tril(np.random.default_rng(n).standard_normal((n, n)).astype(dtype))
    expected = lower + np.tril(lower, -1).T
    matrix = np.where(np.tri(n, dtype=bool), lower, np.nan).astype(dtype)
    assert mirror(matrix) is matrix
    np.testing.assert_array_equal(matrix, expected)


def test_zeros_keep_their_sign():
    """What is stored as a triangle and what is returned are the same bytes."""
    matrix = np.array([[0.0, 1.0], [-0.0, 0.0]], np.float32)
    assert np.signbit(mirror(matrix)).tolist() == [[False, True], [True, False]]

"""The comparison of two-sided rounding with LDLQ: its problems, its records and its table."""

import numpy as np
import pytest

from qjax import codebooks
from qjax.bench import two_sided
from qjax.errors import InputError


def test_the_factors_have_the_spectrum():
    values = np.linalg.eigvalsh(two_sided.power_law(np.random.default_rng(0), 12, 1.5).astype(np.float64))
    np.testing.assert_allclose(values[::-1], np.arange(1, 13) ** -1.5, rtol=1e-4)


def test_a_record_has_times_losses_and_their_ratios():
    book = codebooks.make("e8p", 2)
    record = two_sided.measure((32, 48), book, repeats=2)
    assert record["size"] == "32x48" and record["codebook"] == book.spec()
    for name in ("ldlq", "yaqa"):
        assert 0 < record["seconds"][name]["seconds_min"] <= record["seconds"][name]["seconds_max"]
    assert record["ratio"] > 0
    assert record["proxy_loss"]["yaqa"] < record["proxy_loss"]["ldlq"]
    losses = two_sided.loss_ratios(64, book, seeds=2)
    assert len(losses["loss_ratio"]) == 2 and max(losses["loss_ratio"]) < 1 < min(losses["one_sided_loss_ratio"])
    headers, rows = two_sided.lines([losses, record])
    assert all(len(row) == len(headers) for row in rows) and rows[1][:2] == ("e8p", "32x48")


def test_no_repeats_is_an_error():
    with pytest.raises(InputError, match="repeats is 0"):
        two_sided.measure((32, 48), codebooks.make("e8p", 2), repeats=0)

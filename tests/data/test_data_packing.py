"""Windows and the choice among them, against direct definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.data.packing import choose, document_windows, interleave, permutation, shares, stream_windows
from qjax.errors import InputError


@given(st.integers(0, 200), st.integers(2, 9), st.sampled_from([None, 7]))
def test_stream_windows_tile_the_stream_without_gap_or_overlap(count, length, prefix):
    ids = np.arange(1000, 1000 + count, dtype=np.int32)
    windows = stream_windows(ids, length, prefix)
    step = length if prefix is None else length - 1
    assert windows.shape == (count // step, length)
    body = windows if prefix is None else windows[:, 1:]
    np.testing.assert_array_equal(body.reshape(-1), ids[: count // step * step])
    if prefix is not None:
        assert (windows[:, 0] == prefix).all()


@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(["random", "even", "first"]), st.data())
def test_chosen_windows_differ_and_exist(available, seed, how, data):
    wanted = data.draw(st.integers(1, available))
    chosen = choose(available, wanted, how, seed)
    assert len(set(chosen.tolist())) == wanted
    assert chosen.min() >= 0 and chosen.max() < available


@given(st.integers(2, 300), st.integers(0, 2**31), st.data())
def test_smaller_random_budget_is_a_prefix_of_a_larger_one(available, seed, data):
    small = data.draw(st.integers(1, available - 1))
    np.testing.assert_array_equal(
        choose(available, available, "random", seed)[:small], choose(available, small, "random", seed)
    )


def test_permutation_is_the_same_everywhere():
    # Recorded once: Philox words are part of numpy's stability promise, its shuffles are not.
    assert permutation(10, 0).tolist() == sorted(range(10), key=np.random.Philox(0).random_raw(10).tolist().__getitem__)
    assert permutation(10, 0).tolist() != permutation(10, 1).tolist()


def test_even_choice_by_hand():
    assert choose(10, 2, "even", 0).tolist() == [2, 7]
    assert choose(7, 7, "even", 0).tolist() == list(range(7))
    assert choose(100, 1, "even", 0).tolist() == [50]


def test_unknown_choice_lists_what_exists():
    with pytest.raises(InputError, match="random, even, first"):
        choose(3, 1, "odd", 0)


def test_document_windows_skip_short_documents_and_start_where_asked():
    documents = [np.arange(n, dtype=np.int32) + 100 * n for n in (3, 8, 5, 20)]
    first = list(document_windows(enumerate(documents), 5, random_start=False, seed=0))
    assert [window.tolist() for window in first] == [list(range(100 * n, 100 * n + 5)) for n in (8, 5, 20)]
    drawn = list(document_windows(enumerate(documents), 5, random_start=True, seed=3))
    assert len(drawn) == 3
    for window, document in zip(drawn, [documents[1], documents[2], documents[3]], strict=True):
        start = int(window[0] - document[0])
        np.testing.assert_array_equal(window, document[start : start + 5])
    prefixed = list(document_windows(enumerate(documents), 5, random_start=False, seed=0, prefix=1))
    assert prefixed[0].tolist() == [1, 800, 801, 802, 803]


def test_random_starts_reach_every_place():
    document = np.arange(8, dtype=np.int32)
    starts = {int(next(document_windows([(index, document)], 5, random_start=True, seed=0))[0]) for index in range(60)}
    assert starts == {0, 1, 2, 3}


@given(st.integers(0, 500), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_add_up_and_stay_within_one_of_the_exact_part(total, weights):
    parts = shares(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-9


def test_interleaving_keeps_proportions_in_every_prefix():
    rows = interleave([np.zeros((30, 2), np.int32), np.ones((10, 2), np.int32)])
    for end in range(4, 41, 4):
        assert rows[:end, 0].sum() == end // 4

"""GF(p^e) tables against the field axioms and against arithmetic modulo a prime."""

import itertools

import numpy as np
import pytest

from qjax.errors import InputError
from qjax.linalg.galois import difference_table, irreducible_polynomial, prime_power, quadratic_character


def test_prime_powers_below_200_match_a_sieve():
    primes = [n for n in range(2, 200) if all(n % d for d in range(2, n))]
    expected = {p**e: (p, e) for p in primes for e in range(1, 8) if p**e < 200}
    assert {q: prime_power(q) for q in range(-1, 200) if prime_power(q)} == expected


@pytest.mark.parametrize(("p", "e"), [(2, 3), (3, 2), (3, 3), (5, 2), (7, 3), (11, 2)])
def test_modulus_is_irreducible(p, e):
    """Degrees 2 and 3: irreducible exactly when there is no root."""
    modulus = irreducible_polynomial(p, e)
    assert len(modulus) == e + 1
    assert modulus[-1] == 1
    assert all(sum(c * x**i for i, c in enumerate(modulus)) % p for x in range(p))


def test_degree_four_modulus_is_not_a_product_of_quadratics():
    modulus = irreducible_polynomial(3, 4)
    for a, b, c, d in itertools.product(range(3), repeat=4):
        product = np.convolve([a, b, 1], [c, d, 1]) % 3
        assert tuple(product) != modulus


@pytest.mark.parametrize("p", [3, 7, 11, 43, 67])
def test_prime_field_is_arithmetic_modulo_p(p):
    a = np.arange(p)
    np.testing.assert_array_equal(difference_table(p), (a[:, None] - a[None, :]) % p)
    euler = np.array([pow(int(x), (p - 1) // 2, p) for x in a])
    np.testing.assert_array_equal(quadratic_character(p) % p, euler)


@pytest.mark.parametrize("q", [9, 25, 27, 49, 81, 343, 729])
def test_character_of_a_prime_power_field(q):
    """Balanced, χ(−1) = (−1)^((q−1)/2), and Jacobsthal's Q Qᵀ = qI − J, which fails for arithmetic modulo q."""
    character = quadratic_character(q)
    table = difference_table(q)
    assert (character == 1).sum() == (character == -1).sum() == (q - 1) // 2
    minus = table[0]
    assert character[minus[1]] == (-1) ** ((q - 1) // 2)
    core = character[table].astype(np.int64)
    np.testing.assert_array_equal(core @ core.T, q * np.eye(q, dtype=np.int64) - 1)
    assert np.unique(table, axis=1).shape == (q, q)
    wrong = character[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q].astype(np.int64)
    assert not np.array_equal(wrong @ wrong.T, q * np.eye(q) - 1)


@pytest.mark.parametrize("q", [1, 6, 12, 100])
def test_other_orders_are_refused(q):
    with pytest.raises(InputError, match=f"order {q}"):
        difference_table(q)


def test_even_characteristic_has_no_character():
    with pytest.raises(InputError, match="odd order"):
        quadratic_character(8)

"""Laws that every registered rounding obeys with every registered codebook it accepts (`qjax.testing`).

A new algorithm or codebook is covered by being registered; combinations it refuses must be refused with an InputError.
"""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from qjax import codebooks, rounding
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.rounding.base import check_shapes
from qjax.testing import Refused
from qjax.testing.problems import book, problem
from qjax.testing.rounding_laws import LAWS

NAMES = sorted({book(name).spec()["name"] for name in codebooks.CODEBOOKS})  # without names that stand for others
REFUSED = {"randomised", "rows are coded jointly", "plain rounding itself"}  # by the laws; the others are pairs


def refusal(law, algorithm, name):
    """Why there is no such pair; None where the law holds."""
    try:
        LAWS[law](algorithm, name)
    except Refused as reason:
        return str(reason)
    return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("algorithm", sorted(rounding.ROUNDINGS))
@pytest.mark.parametrize("law", LAWS)
def test_a_law(law, algorithm, name):
    reason = refusal(law, algorithm, name)
    if reason is not None:
        assert reason in REFUSED or "use" in reason or "needs" in reason
        pytest.skip(f"refused: {reason}")


def test_every_algorithm_takes_some_codebook_and_every_codebook_most_algorithms():
    """Laws that all pairs refuse would hold for nothing."""
    law = "the_same_inputs_give_the_same_codes"
    pairs = [(algorithm, name) for algorithm in rounding.ROUNDINGS for name in NAMES]
    held = {pair for pair in pairs if refusal(law, *pair) is None}
    assert {algorithm for algorithm, _ in held} == set(rounding.ROUNDINGS)
    assert all(sum(name == other for _, other in held) >= 4 for name in NAMES)


@pytest.mark.parametrize("algorithm", sorted(rounding.ROUNDINGS))
def test_shapes_that_do_not_fit_are_refused(algorithm):
    w, h = problem()
    with pytest.raises((InputError, jaxtyping.TypeCheckError), match="shape|out in"):  # annotations are checked first
        rounding.make(algorithm)(
            jnp.asarray(w[0]), Hessian(jnp.asarray(h)), book("half_integer"), key=jax.random.key(0)
        )
    with pytest.raises(InputError, match=r"shape \[out, in\]"):  # and the check that users meet
        check_shapes(jnp.asarray(w[0]), Hessian(jnp.asarray(h)), book("half_integer"))


def test_unknown_names_list_what_exists():
    with pytest.raises(InputError, match="gptq.*ldlq.*nearest"):
        rounding.make("gtpq")
    with pytest.raises(InputError, match="block.*order"):
        rounding.make("ldlq", blocks=8)

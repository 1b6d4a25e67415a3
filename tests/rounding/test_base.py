"""The base class of roundings does checks, default scaling, keys and decoding once for every algorithm."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks, rounding
from qjax.codebooks.scaling import Scaling
from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.rounding.base import Coded, Problem, Rounding, RoundingAlgorithm

BOOK = codebooks.make("half_integer", 2)  # levels −1.5, −0.5, 0.5, 1.5
WEIGHT = np.array([[0.4, -3.0, 1.2], [-0.6, 0.1, 9.0]], np.float32)
LEVELS = np.array([[0.5, -1.5, 1.5], [-0.5, 0.5, 1.5]], np.float32)  # nearest, by hand
HESSIAN = Hessian(jnp.eye(3))


@dataclasses.dataclass(frozen=True)
class Backwards(RoundingAlgorithm):
    """Nearest codes of the columns in reverse order."""

    name: ClassVar[str] = "backwards"
    random: bool = False

    @property
    def randomised_by(self):
        return "rounding.random" if self.random else None

    def round(self, problem: Problem) -> Coded:
        assert (problem.key is None) == (not self.random)
        codes = BOOK.quantize(problem.scaling.to_codebook_units(problem.weight))[:, ::-1]
        return Coded(codes, damping=0.5, permutation=jnp.arange(3)[::-1], start=codes)


def test_values_are_decoded_and_put_back_into_the_order_of_the_weight():
    done = Backwards()(jnp.asarray(WEIGHT), HESSIAN, BOOK)
    np.testing.assert_array_equal(done.values, LEVELS)
    np.testing.assert_array_equal(done.start, LEVELS)
    assert done.damping == 0.5 and bool(done.ok) and done.output_damping is None
    np.testing.assert_array_equal(BOOK.dequantize(done.codes), LEVELS[:, ::-1])


def test_scales_reach_the_algorithm_and_the_values():
    done = Backwards()(jnp.asarray(WEIGHT * 4), HESSIAN, BOOK, scaling=Scaling(jnp.float32(4)))
    np.testing.assert_array_equal(done.values, LEVELS * 4)


def test_values_that_are_not_finite_are_not_ok():
    done = Backwards()(jnp.asarray(WEIGHT), HESSIAN, BOOK, scaling=Scaling(jnp.float32(np.inf)))
    assert not bool(done.ok)


def test_a_key_is_asked_for_by_randomised_algorithms_and_kept_from_others():
    weight = jnp.asarray(WEIGHT)
    Backwards()(weight, HESSIAN, BOOK, key=jax.random.key(0))
    Backwards(random=True)(weight, HESSIAN, BOOK, key=jax.random.key(0))
    with pytest.raises(InputError, match=r"rounding\.random is randomised and needs key"):
        Backwards(random=True)(weight, HESSIAN, BOOK)


@pytest.mark.parametrize(
    ("shape", "hessian", "message"),
    [
        ((2, 4), Hessian(jnp.eye(3)), "input Hessian"),
        ((2, 3), Hessian(jnp.eye(3), jnp.eye(3)), "output Hessian"),
    ],
)
def test_shapes_are_refused_before_the_algorithm_runs(shape, hessian, message):
    with pytest.raises(InputError, match=message):
        Backwards()(jnp.zeros(shape), hessian, BOOK)


def test_an_algorithm_is_a_static_argument():
    def rounded(weight, method):
        return method(weight, HESSIAN, BOOK).values

    assert isinstance(Backwards(), Rounding)
    assert Backwards() == Backwards() and hash(Backwards()) == hash(Backwards()) and Backwards() != Backwards(True)
    assert Backwards().spec() == {"name": "backwards", "random": False}
    np.testing.assert_array_equal(jax.jit(rounded, static_argnums=1)(WEIGHT, Backwards()), LEVELS)


@pytest.mark.parametrize("name", sorted(rounding.ROUNDINGS))
def test_every_registered_rounding_is_built_again_from_its_spec(name):
    method = rounding.make(name)
    assert method.spec()["name"] == name
    assert rounding.make(**method.spec()) == method

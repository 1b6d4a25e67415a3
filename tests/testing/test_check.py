"""`qjax.testing.check`: what is right passes, what is wrong is named with its law."""

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import pytest

import qjax.testing
from qjax.codebooks import CODEBOOKS
from qjax.codebooks.scalar import half_integer
from qjax.errors import InputError
from qjax.registry import Registry
from qjax.rounding import LDLQ, ROUNDINGS, Nearest, RoundingAlgorithm
from qjax.testing import LawBroken, rounding_laws
from qjax.testing.rounding_laws import LAWS

PACKAGES = Path(__file__).parents[1] / "fixtures" / "plugins"


@pytest.fixture
def registered(monkeypatch):
    """Puts something into a registry for one test."""

    def put(registry: Registry, name, constructor):
        monkeypatch.setitem(registry._table, name, constructor)
        return name

    return put


@dataclasses.dataclass(frozen=True)
class Forgetful(RoundingAlgorithm):
    """A rounding that ignores the Hessian: everything holds but that feedback helps."""

    name: ClassVar[str] = "forgetful"

    def round(self, problem):
        return Nearest().round(problem)


@dataclasses.dataclass(frozen=True)
class Scaled(RoundingAlgorithm):
    """A rounding whose damping is absolute: the scale of the Hessian then has a meaning."""

    name: ClassVar[str] = "scaled"

    def round(self, problem):
        size = jnp.mean(jnp.diagonal(problem.input_hessian))
        return LDLQ().round(dataclasses.replace(problem, damping=1e-2 / size))


@pytest.mark.parametrize(
    ("algorithm", "law"),
    [(Forgetful, "feedback beats nearest"), (Scaled, "the scale of the hessian has no meaning")],
)
def test_a_rounding_that_breaks_a_law_is_told_which(algorithm, law, registered):
    name = registered(ROUNDINGS, algorithm.name, algorithm)
    with pytest.raises(LawBroken, match=f"rounding '{name}' with half_integer: {law}"):
        qjax.testing.check("rounding", name, ["half_integer"])


def test_a_codebook_that_breaks_a_law_is_told_which(registered):
    class Lossy(type(half_integer(2))):
        def unpack(self, packed, shape):
            return super().unpack(packed, shape) ^ 1

    name = registered(CODEBOOKS, "lossy", lambda bits: Lossy("lossy", int(bits), 1.0, -1.5))
    with pytest.raises(LawBroken, match="codebook 'lossy': codes survive packing: codes after packing: .* differ"):
        qjax.testing.check("codebook", name)


def test_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="no laws for 'roundng'.*did you mean 'rounding'"):
        qjax.testing.check("roundng", "ldlq")
    with pytest.raises(InputError, match="rounding 'ldql' is not registered.*did you mean 'ldlq'"):
        qjax.testing.check("rounding", "ldql")


def test_refusals_are_outcomes():
    outcomes = qjax.testing.check("data", "pydoc") + qjax.testing.check("incoherence", "hadamard")
    assert [outcome.refused for outcome in outcomes] == [None, None]
    with pytest.raises(qjax.testing.Refused, match="one column wide|use"):
        rounding_laws.LAWS["values_are_the_decoded_codes"]("gptq", "e8p")
    assert set(LAWS) >= {"zero_weights_stay_finite", "shapes_that_do_not_fit_are_refused"}


@pytest.mark.slow
def test_a_package_of_a_users_own_obeys_the_laws(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGES)
    before = [dict(registry._table) for registry in Registry.known.values()]
    try:
        import own_methods  # pyright: ignore[reportMissingImports]

        assert own_methods
        for kind, name in [("data", "own_numbers"), ("hessian", "own_moment"), ("codebook", "own_powers")]:
            assert all(outcome.refused is None for outcome in qjax.testing.check(kind, name, []))
        assert len(qjax.testing.check("rounding", "own_ldlq", ["half_integer", "e8p", "trellis"])) == 27
    finally:
        for registry, table in zip(Registry.known.values(), before, strict=True):
            registry._table.clear()
            registry._table.update(table)
        for name in [name for name in sys.modules if name.partition(".")[0] == "own_methods"]:
            del sys.modules[name]

"""Small problems that laws are tried on, and what comes of a law that does not hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qjax import codebooks, rounding
from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import ScaleRule, fit
from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.rounding.base import Rounded

__all__ = ["IN", "OUT", "LawBroken", "Refused", "book", "finite", "in_groups", "problem", "rounded", "the_same"]

OUT, IN = 32, 64


class LawBroken(AssertionError):
    """A registered entry that does not do what all others do."""


class Refused(Exception):
    """A pair of algorithm and codebook that does not exist, refused as it should be, with a remedy."""


@functools.cache
def book(name: str) -> Codebook:
    """The codebook at the smallest bit width it has."""
    for bits in (2, 1, 3, 4):
        try:
            return codebooks.make(name, bits)
        except InputError:
            continue
    raise LawBroken(f"codebook {name!r} has none of 1 to 4 bits per weight")


@functools.cache
def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(weight [32, 64], Hessian [64, 64]) with correlated inputs of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * IN, IN)) @ (rng.standard_normal((IN, IN)) * np.exp(-np.arange(IN) / 16)[:, None])
    return rng.standard_normal((OUT, IN)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


@functools.cache
def _compiled(algorithm: str, name: str) -> Callable[[Any, Any], Rounded]:
    method, codebook = rounding.make(algorithm), book(name)
    return jax.jit(lambda w, h: method(w, Hessian(h), codebook, key=jax.random.key(7)))


def rounded(algorithm: str, name: str, weight: np.ndarray, hessian: np.ndarray) -> Rounded:
    """The weight, in units of the codebook's RMS, rounded under `jit` by a registered algorithm.

    Raises Refused where the pair is refused in words that name a remedy, LawBroken for a refusal without one.
    """
    with _refusals():
        return _compiled(algorithm, name)(weight * np.float32(book(name).rms), hessian)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """InputError becomes Refused where it is in words that name a remedy, LawBroken else."""
    try:
        yield
    except InputError as error:
        if not ("use" in str(error) or "needs" in str(error)):
            raise LawBroken(f"the refusal names no remedy (use …, needs …): {error}") from error
        raise Refused(str(error)) from error


def in_groups(algorithm: str, name: str, group: int, weight: Any, hessian: Any) -> tuple[Array, Array, Array]:
    """(rounded weight, packed codes, scales) with a scale for every `group` columns of a row; traceable.

    Scales are fitted as `quantize_matrix` does. Raises as `rounded`.
    """
    codebook, method = book(name), rounding.make(algorithm)
    rule = ScaleRule("minmax" if name == "grid" else "rms", "group", group)
    if "rule" in {field.name for field in dataclasses.fields(cast(Any, method))}:
        method = dataclasses.replace(cast(Any, method), rule=rule)
    with _refusals():
        scaling, key = fit(weight, codebook, rule), jax.random.key(7)
        result = method(weight, Hessian(hessian), codebook, scaling=scaling, key=key)
    return result.values, codebook.pack(result.codes), result.scaling.relative


def the_same(what: str, one: Any, other: Any) -> None:
    """Raises LawBroken unless two arrays are equal to the bit."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape:
        raise LawBroken(f"{what}: shapes {one.shape} and {other.shape}")
    if not np.array_equal(one, other, equal_nan=True):
        where = np.argwhere(np.asarray(one != other))
        raise LawBroken(f"{what}: {len(where)} of {one.size} entries differ, the first at {tuple(where[0])}")


def finite(what: str, values: Any) -> None:
    """Raises LawBroken for a value that is not finite."""
    if not bool(jnp.all(jnp.isfinite(jnp.asarray(values)))):
        raise LawBroken(f"{what} is not finite everywhere")

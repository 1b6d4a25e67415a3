"""The contract of roundings, and the base class that does once what every algorithm needs besides its mathematics."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling, identity
from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.registry import Registry, check_options
from qjax.typing import pytree

__all__ = ["ROUNDINGS", "Coded", "Problem", "Rounded", "Rounding", "RoundingAlgorithm", "check_shapes"]


@pytree
class Rounded:
    """A matrix rounded to a codebook.

    Attributes:
      values: `[out, in]` the rounded matrix, in the units and column order of the weight.
      codes: the codebook's codes, of the columns in the order of `permutation`.
      scaling: the scales and zeros used.
      permutation: column order of the codes (`weight[:, permutation]` was coded), or None for the natural order.
      damping: multiple of the mean diagonal that was added to H (0 when the algorithm uses no Hessian).
      ok: False when no damping up to the cap made H factorisable, or a value is not finite.
      start: `[out, in]` the values before the coordinate-descent passes, or None without passes.
      output_damping: as `damping`, of H_out; None for roundings that do not use it.
    """

    values: Float[Array, "out in"]
    codes: Shaped[Array, "..."]
    scaling: Scaling
    permutation: Shaped[Array, " in"] | None
    damping: Float[Array, ""]
    ok: Array
    start: Float[Array, "out in"] | None = None
    output_damping: Float[Array, ""] | None = None


@runtime_checkable
class Rounding(Protocol):
    """A frozen, hashable algorithm: `rounding(weight, hessian, codebook, ...) -> Rounded`; pure and traceable.

    Without `scaling` the weight is in the codebook's own units. `damping` is relative to the mean diagonal of H.
    `key` is needed by randomised algorithms only.
    """

    def __call__(
        self,
        weight: Float[Array, "out in"],
        hessian: Hessian,
        codebook: Codebook,
        *,
        scaling: Scaling | None = None,
        damping: Float[Array, ""] | float = 0.01,
        key: Array | None = None,
    ) -> Rounded:
        """Round `weight` [out, in] (dimensions divisible by the codebook's tile)."""
        ...

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this algorithm again."""
        ...


ROUNDINGS: Registry[Rounding] = Registry("rounding", "qjax.rounding.ROUNDINGS")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of one rounding, checked and completed.

    Attributes:
      weight: W `[out, in]`, made of whole tiles of the codebook.
      hessian: H_in `[in, in]`, and H_out `[out, out]` or None.
      codebook: the finite set of tiles.
      scaling: scales and zeros; the identity where none were given.
      damping: asked for, relative to the mean diagonal of H.
      key: of a randomised algorithm, None for the others.
    """

    weight: Float[Array, "out in"]
    hessian: Hessian
    codebook: Codebook
    scaling: Scaling
    damping: Array | float
    key: Array | None

    @property
    def input_hessian(self) -> Float[Array, "in in"]:
        """H_in in the dtype of the weight."""
        return self.hessian.input.astype(self.weight.dtype)


@dataclasses.dataclass(frozen=True)
class Coded:
    """The result of an algorithm's mathematics: codes, of which `RoundingAlgorithm` makes the values of `Rounded`.

    Attributes:
      codes: the codebook's codes, of the columns in the order of `permutation`.
      damping: multiple of the mean diagonal that was added to H_in.
      ok: whether H could be factored.
      permutation: as in `Rounded`.
      start: the codes before the coordinate-descent passes, or None without passes.
      scaling: scales fitted on the way, None for those of the problem.
      output_damping: as in `Rounded`.
    """

    codes: Shaped[Array, "..."]
    damping: Array | float = 0.0
    ok: Array | bool = True
    permutation: Array | None = None
    start: Shaped[Array, "..."] | None = None
    scaling: Scaling | None = None
    output_damping: Array | None = None


@dataclasses.dataclass(frozen=True)
class RoundingAlgorithm(abc.ABC):
    """Base class of roundings: checks, default scaling, key, decoded values and `spec`; a subclass adds `round`.

    A subclass is a frozen dataclass whose fields are its options, checked by their types (`qjax.registry.ranges`).

    Attributes:
      name: the registered name.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the options. Raises InputError for a value of another kind or out of its range."""
        check_options(self, "rounding")

    @abc.abstractmethod
    def round(self, problem: Problem) -> Coded:
        """Codes for the weight of `problem`. Raises InputError for a codebook that the algorithm cannot use."""

    @property
    def independent_rows(self) -> bool:
        """Whether every row (of tiles) is rounded as if alone, so that rows may be split over devices."""
        return False

    @property
    def randomised_by(self) -> str | None:
        """The setting that makes the algorithm draw random numbers and need a key; None where it draws none."""
        return None

    def __call__(
        self,
        weight: Float[Array, "out in"],
        hessian: Hessian,
        codebook: Codebook,
        *,
        scaling: Scaling | None = None,
        damping: Array | float = 0.01,
        key: Array | None = None,
    ) -> Rounded:
        """Round `weight` [out, in].

        Raises InputError for shapes that are not whole tiles or do not belong together, for a codebook or options that
        the algorithm refuses, and for a randomised algorithm without a key.
        """
        check_shapes(weight, hessian, codebook)
        if self.randomised_by is None:
            key = None
        elif key is None:
            raise InputError(f"{self.randomised_by} is randomised and needs key=jax.random.key(seed)")
        scaling = identity() if scaling is None else scaling
        problem = Problem(weight, hessian, codebook, scaling, damping, key)
        return _rounded(problem, self.round(problem))

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this algorithm again."""
        return {"name": self.name, **dataclasses.asdict(self)}


def _rounded(problem: Problem, coded: Coded) -> Rounded:
    """The whole result; `values` are exactly what a decoder will see, not a running difference."""
    dtype = problem.weight.dtype
    scaling = problem.scaling if coded.scaling is None else coded.scaling

    def seen(codes: Array) -> Array:
        values = scaling.from_codebook_units(problem.codebook.dequantize(codes).astype(dtype))
        return values if coded.permutation is None else jnp.take(values, jnp.argsort(coded.permutation), axis=1)

    values = seen(coded.codes)
    return Rounded(
        values=values,
        codes=coded.codes,
        scaling=scaling,
        permutation=coded.permutation,
        damping=jnp.asarray(coded.damping, dtype),
        ok=jnp.asarray(coded.ok) & jnp.all(jnp.isfinite(values)),
        start=None if coded.start is None else seen(coded.start),
        output_damping=None if coded.output_damping is None else jnp.asarray(coded.output_damping, dtype),
    )


def check_shapes(weight: Array, hessian: Hessian, codebook: Codebook) -> None:
    """Raise InputError unless the weight is [out, in], H is [in, in] and tiles divide the matrix (static checks)."""
    if weight.ndim != 2:
        raise InputError(f"a weight matrix has shape [out, in]; found shape {tuple(weight.shape)}")
    out, columns = weight.shape
    if hessian.input.shape != (columns, columns):
        raise InputError(
            f"the Hessian has shape {tuple(hessian.input.shape)} and the weight {tuple(weight.shape)}; "
            f"the input Hessian of this weight is [{columns}, {columns}]"
        )
    if hessian.output is not None and hessian.output.shape != (out, out):
        raise InputError(
            f"the output Hessian has shape {tuple(hessian.output.shape)} and the weight {tuple(weight.shape)}; "
            f"that of this weight is [{out}, {out}]"
        )
    rows, width = codebook.tile
    if out % rows or columns % width:
        raise InputError(
            f"a matrix of shape ({out}, {columns}) is not made of whole {rows}×{width} tiles; "
            "pad it (qjax.quantize_matrix does) or choose another codebook"
        )

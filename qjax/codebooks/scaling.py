"""Scales and zeros: how the values of a matrix are brought into a codebook's range, `x = w / scale + zero`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax.codebooks.base import Codebook
from qjax.errors import InputError
from qjax.registry import Count, Natural, OneOf, Positive, check_options
from qjax.typing import Leaf, pytree, static

__all__ = ["ScaleRule", "Scaling", "fit", "identity"]

_NOTHING = 1e-30  # the scale of a matrix of zeros: a grid without a zero then gives values of no weight
_FLOAT16_REACH = 2.0**15


@dataclasses.dataclass(frozen=True)
class ScaleRule:
    """The rule by which scales are chosen; static and hashable.

    Attributes:
      method: "auto": the codebook's own, "minmax" for the affine grid and "rms" for the others;
        "rms": `scale = RMS(w) / rms`; "minmax": the affine grid of GPTQ (`grid` codebook only);
        "search": as "rms", with the factor among `candidates` that gives the least proxy loss after rounding.
      granularity: one scale for the "matrix", for every "row", or for every "group" of columns of a row; None is "row"
        for "minmax" and "matrix" for the others.
      group_size: columns of a group; None without groups.
      rms: the input RMS that the codebook sees; None means the codebook's own.
      candidates: factors on `rms` that "search" tries.
      shrink_steps: for "minmax": how many shrunken ranges (1 − i/100) are tried for the least `Σ|error|^2.4`;
        0 keeps the full range.
    """

    method: Annotated[str, OneOf("auto", "rms", "minmax", "search")] = "rms"
    granularity: Annotated[str, OneOf("matrix", "row", "group")] | None = None
    group_size: Count | None = None
    rms: Positive | None = None
    candidates: tuple[Positive, ...] = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
    shrink_steps: Natural = 0

    def __post_init__(self) -> None:
        check_options(self, "scale")
        if self.granularity is None:
            object.__setattr__(self, "granularity", "row" if self.method == "minmax" else "matrix")
        if (self.granularity == "group") != (self.group_size is not None):
            raise InputError(
                f"scale.granularity is {self.granularity!r} and scale.group_size is {self.group_size}; "
                "give a group size with granularity=group and only then"
            )
        if self.method == "search" and not self.candidates:
            raise InputError("scale.candidates is empty; search needs at least one positive factor")


@pytree
class Scaling:
    """The scales of one matrix: `scale = unit · relative`, `x = w / scale + zero`.

    Attributes:
      unit: float32 scalar.
      relative: float16 `[rows or 1, groups]`, or None for one scale for the whole matrix.
      zero: uint8 `[rows or 1, groups]` integers, or None for symmetric codebooks.
      group: columns per group (static); None means one group.
    """

    unit: Leaf
    relative: Leaf = None
    zero: Leaf = None
    group: int | None = static(default=None)

    def at(self, columns: Int[Array, " width"], dtype: DTypeLike) -> tuple[Array, Array]:
        """(scale, zero), each `[rows or 1, width or 1]`, of the columns with these indices."""
        scale = self.unit.astype(dtype).reshape(1, 1)
        zero = jnp.zeros((1, 1), dtype)
        if self.relative is None:
            return scale, zero
        relative, offset = self.relative, self.zero
        if self.group is not None:
            index = columns // self.group
            relative = jnp.take(relative, index, axis=1, mode="clip")
            offset = None if offset is None else jnp.take(offset, index, axis=1, mode="clip")
        return scale * relative.astype(dtype), zero if offset is None else offset.astype(dtype)

    def to_codebook_units(self, weight: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """`w / scale + zero`."""
        scale, zero = self.at(jnp.arange(weight.shape[1]), weight.dtype)
        return weight / scale + zero

    def from_codebook_units(self, values: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """`(x − zero) · scale`."""
        scale, zero = self.at(jnp.arange(values.shape[1]), values.dtype)
        return (values - zero) * scale


def identity() -> Scaling:
    """Scale 1 and zero 0: the weights are in the codebook's own units."""
    return Scaling(unit=jnp.float32(1.0))


def _grouped(weight: Array, rule: ScaleRule) -> Array:
    """`[rows or 1, groups, values]`: the values that share a scale lie on the last axis; zeros fill the last group."""
    m, n = weight.shape
    if rule.granularity == "matrix":
        return weight.reshape(1, 1, m * n)
    if rule.granularity == "row":
        return weight.reshape(m, 1, n)
    assert rule.group_size is not None
    groups = -(-n // rule.group_size)
    return jnp.pad(weight, ((0, 0), (0, groups * rule.group_size - n))).reshape(m, groups, rule.group_size)


def fit(
    weight: Float[Array, "m n"],
    codebook: Codebook,
    rule: ScaleRule,
    factor: Array | float = 1.0,
    unit: Array | None = None,
) -> Scaling:
    """The scaling of a matrix by `rule`; `factor` multiplies the RMS that the codebook sees (used by the search).

    `unit` fixes the float32 part, so that scalings fitted group by group can be put together.

    "rms": `scale = sqrt(mean w²) / (rms · factor)`.
    "minmax" (GPTQ): `scale = (max − min) / (2^b − 1)`, `zero = round(−min / scale)`, with 0 inside [min, max].
    All-zero rows and groups get the smallest scale there is. Works under jit.
    """
    values = _grouped(weight, rule)
    if rule.method == "minmax":
        return _fit_minmax(values, codebook, rule, unit)
    mean = jnp.mean(jnp.square(values), axis=-1)
    if rule.group_size is not None and (rest := weight.shape[1] % rule.group_size):
        mean = mean.at[:, -1].multiply(rule.group_size / rest)  # of the last group, without the zeros that fill it
    scale = jnp.sqrt(mean) / ((rule.rms or codebook.rms) * factor)
    return _assemble(scale, None, rule, unit)


def _assemble(scale: Array, zero: Array | None, rule: ScaleRule, unit: Array | None) -> Scaling:
    positive = (scale > 0) & jnp.isfinite(scale)
    largest = jnp.max(jnp.where(positive, scale, 0))
    # What is all zero must not move the common unit, and its codewords must come out as good as zero.
    scale = jnp.where(positive, scale, jnp.where(largest > 0, largest, _NOTHING))
    group = rule.group_size if rule.granularity == "group" else None
    if rule.granularity == "matrix" and zero is None:
        return Scaling(unit=scale[0, 0])
    if unit is None:
        # The geometric mean keeps the float16 factors near one; the second bound keeps the largest of them finite.
        unit = jnp.maximum(jnp.exp(jnp.mean(jnp.log(scale))), jnp.max(scale) / _FLOAT16_REACH)
    # Never zero, never infinite in float16.
    ratio = jnp.where(positive, scale / unit.astype(scale.dtype), 0)
    relative = jnp.clip(ratio, 1 / 2**24, _FLOAT16_REACH)
    return Scaling(unit.astype(jnp.float32), relative.astype(jnp.float16), zero, group)


def _fit_minmax(values: Array, codebook: Codebook, rule: ScaleRule, unit: Array | None) -> Scaling:
    if getattr(codebook, "name", None) != "grid":
        raise InputError(
            f"scale.method=minmax fits an affine grid, but the codebook is {getattr(codebook, 'name', codebook)!r}; "
            "use codebook=grid, or scale.method=rms"
        )
    top = 2**codebook.bits - 1
    low = jnp.minimum(jnp.min(values, axis=-1), 0)
    high = jnp.maximum(jnp.max(values, axis=-1), 0)

    def at(shrink: Array | float) -> tuple[Array, Array]:
        scale = (high - low) * shrink / top
        scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
        return scale, jnp.clip(jnp.round(-low * shrink / scale), 0, top)

    scale, zero = at(1.0)
    if rule.shrink_steps:

        def loss(scale: Array, zero: Array) -> Array:
            level = jnp.clip(jnp.round(values / scale[..., None]) + zero[..., None], 0, top)
            return jnp.sum(jnp.abs((level - zero[..., None]) * scale[..., None] - values) ** 2.4, axis=-1)

        def step(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            scale, zero = at(1.0 - i.astype(values.dtype) / 100)
            error = loss(scale, zero)
            better = error < best[2]
            return (
                jnp.where(better, scale, best[0]),
                jnp.where(better, zero, best[1]),
                jnp.where(better, error, best[2]),
            )

        scale, zero, _ = jax.lax.fori_loop(1, rule.shrink_steps, step, (scale, zero, loss(scale, zero)))
    return _assemble(scale, zero.astype(jnp.uint8), rule, unit)

"""The composition for one matrix: incoherence ∘ scaling ∘ rounding ∘ codebook."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import ScaleRule, fit
from qjax.errors import NumericsError
from qjax.incoherence.families import Incoherence
from qjax.linalg.compiled import lean_jit
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import name_id, root_key, seed_of
from qjax.matrix.arguments import (
    Short,
    check_numbers,
    codebook_of,
    hessian_of,
    incoherence_of,
    mesh_of,
    rounding_of,
    scale_of,
    weight_of,
)
from qjax.matrix.magnitude import exponent, normalized, scaled
from qjax.matrix.quantized import QuantizedMatrix
from qjax.matrix.validate import _validate
from qjax.rounding.base import Rounded, Rounding
from qjax.rounding.correction import corrected_weight
from qjax.rounding.losses import factor_norms, proxy_loss, quadratic, weight_mse
from qjax.rounding.on_mesh import gathered, independent, round_rows
from qjax.runtime.mesh import place
from qjax.typing import Leaf, pytree

# Sums over rows and columns of squares of larger weights may overflow float32.
_LARGE = 1e14

__all__ = ["MatrixReport", "default_scale_rule", "program", "quantize_matrix", "splits_rows"]


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """The report of one matrix (all losses relative, dimensionless).

    Attributes:
      name: the layer's name.
      shape: (out, in).
      padded: the shape that was coded.
      bits_per_weight: stored bits of codes, scales, zeros, signs and permutation per weight.
      proxy_loss: `tr(E H Eᵀ) / tr(W H Wᵀ)` with the undamped H in the original basis.
      weight_mse: `‖E‖² / ‖W‖²`.
      damping: multiple of H's mean diagonal that was added.
      scale_rms: the RMS of what the codebook saw (its effective scale).
      seconds: wall time of the call, compilation included.
      correction: `tr(Δ H Δᵀ) / tr(W H Wᵀ)` of the change Δ of the target that makes up for earlier errors; 0 without.
      proxy_loss_before_passes: `proxy_loss` before the coordinate-descent passes, None without passes.
      output_damping: multiple of H_out's mean diagonal that was added, None where H_out was not used.
      alignment: `proxy_loss` over that of an error of the same size without direction; 1 for plain rounding after a
        rotation, below it where feedback works.
      fallback: "nearest" where plain rounding was kept because the chosen rounding lost more, else None.
      squared_error: `‖E‖²`, in squared units of the weight.
      tokens: of an expert: those that were routed to it, over which its Hessian was made; None for other layers.
      expert: its number; None for other layers.
      kronecker_loss: `tr(H_out E H_in Eᵀ) / (‖H_out‖ ‖H_in‖)`, H_out = I when absent; likewise.
    """

    name: str
    shape: tuple[int, int]
    padded: tuple[int, int]
    bits_per_weight: float
    proxy_loss: float
    weight_mse: float
    damping: float
    scale_rms: float
    dead_columns: int
    seconds: float
    correction: float = 0.0
    proxy_loss_before_passes: float | None = None
    output_damping: float | None = None
    alignment: float | None = None
    fallback: str | None = None
    squared_error: float = 0.0
    kronecker_loss: float = 0.0
    tokens: int | None = None
    expert: int | None = None

    def values(self) -> dict[str, Any]:
        """As JSON values; what is an expert's alone is left out where it is none."""
        own = ("tokens", "expert") if self.expert is None else ()
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in own}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MatrixReport:
        """A report from JSON values, in which shapes are lists."""
        return cls(**{**values, "shape": tuple(values["shape"]), "padded": tuple(values["padded"])})


@pytree
class _Outcome:
    matrix: QuantizedMatrix
    proxy_loss: Leaf
    weight_mse: Leaf
    damping: Leaf
    scale_rms: Leaf
    dead_columns: Leaf
    ok: Leaf
    correction: Leaf
    proxy_loss_before_passes: Leaf
    output_damping: Leaf
    alignment: Leaf
    squared_error: Leaf
    kronecker_loss: Leaf


def default_scale_rule(codebook: Codebook, scale: float | ScaleRule | None) -> ScaleRule:
    """The rule that `scale` stands for: None is the codebook's default, a number the RMS that the codebook sees.

    The affine `grid` defaults to min–max per row (GPTQ), all other codebooks to one RMS scale for the matrix.
    """
    if isinstance(scale, ScaleRule) and scale.method == "auto":
        scale = None
    if isinstance(scale, ScaleRule):
        return scale
    if scale is None and getattr(codebook, "name", None) == "grid":
        return ScaleRule("minmax", "row")
    return ScaleRule("rms", "matrix", rms=None if scale is None else float(scale))


def _rotated_hessian(hessian: Hessian, transform: Any) -> Hessian:
    output = None if hessian.output is None else transform.output_hessian(hessian.output)
    return Hessian(transform.input_hessian(hessian.input), output, hessian.tokens)


def _with(rounding: Rounding, **options: Any) -> Rounding:
    """`rounding` with those of the options that it has (GPTQ's scale rule, the passes of coordinate descent)."""
    algorithm: Any = rounding  # a frozen dataclass, which a protocol cannot say
    own = {field.name for field in dataclasses.fields(algorithm)}
    return dataclasses.replace(algorithm, **{name: value for name, value in options.items() if name in own})


def splits_rows(rounding: Rounding, codebook: Codebook, scale: float | ScaleRule | None) -> bool:
    """Whether `quantize_matrix` splits the rows over a mesh for this rounding and scale."""
    return independent(_with(rounding, rule=default_scale_rule(codebook, scale)))


def _round_at(
    weight: Array,
    hessian: Hessian,
    codebook: Codebook,
    rounding: Rounding,
    rule: ScaleRule,
    damping: Array,
    key: Array,
    mesh: Mesh | None,
) -> Rounded:
    """Round with the scale of `rule`, searching over its candidates when it asks for that."""
    rounding = _with(rounding, rule=rule)

    def at(factor: Array | float, rounding: Rounding = rounding) -> Rounded:
        scaling = fit(weight, codebook, rule, factor)
        if mesh is not None and independent(rounding):
            return round_rows(rounding, weight, hessian, codebook, scaling=scaling, damping=damping, mesh=mesh)
        return rounding(weight, hessian, codebook, scaling=scaling, damping=damping, key=key)

    if rule.method != "search":
        return at(1.0)

    # One pass ranks the candidates as ten do, in a third of the time.
    trial = _with(rounding, passes=1) if getattr(rounding, "passes", 0) > 1 else rounding

    def loss(factor: Array) -> Array:
        return proxy_loss(weight, at(factor, trial).values, hessian, mesh)

    factors = jnp.asarray(rule.candidates, weight.dtype)
    losses = jax.lax.map(loss, factors)
    return at(factors[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))])  # NaN would be the least


@lean_jit(static_argnames=("rounding", "incoherence", "rule", "mesh"))
def _quantize(
    weight: Array,
    hessian: Hessian,
    codebook: Codebook,
    damping: Array,
    correction: Array,
    key: Array,
    name: Array,
    *,
    rounding: Rounding,
    incoherence: Incoherence,
    rule: ScaleRule,
    mesh: Mesh | None,
) -> _Outcome:
    """One compiled program per shape and recipe; everything that varies between layers is an argument.

    On a mesh everything but the rounding of rows and their losses is computed on every device alike.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # its words, which several processes can share
        key = jax.random.wrap_key_data(key)
    original = weight.astype(jnp.float32)
    weight = original if hessian.cross is None else corrected_weight(original, hessian, correction, damping)
    sign_key, noise_key = jax.random.split(jax.random.fold_in(key, name))
    transform = incoherence.sample(
        sign_key, *weight.shape, multiple=codebook.tile, weight=weight, hessian=hessian.input
    )
    rotated = transform.weight(weight)
    rounded = _round_at(
        rotated, _rotated_hessian(hessian, transform), codebook, rounding, rule, damping, noise_key, mesh
    )
    matrix = QuantizedMatrix(codebook.pack(rounded.codes), rounded.scaling, transform, codebook, rounded.permutation)
    dense = transform.weight_inverse(rounded.values)
    scale, _ = rounded.scaling.at(jnp.arange(rotated.shape[1]), jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(rotated / scale)))
    loss = proxy_loss(weight, dense, hessian, mesh)
    dead = jnp.sum(jnp.diagonal(hessian.input) <= 0)
    mse = weight_mse(weight, dense)
    squared = jnp.sum(jnp.square(weight - dense))
    # The loss alone would not do: a finite error over squares of W that overflow is 0.
    ok = rounded.ok & jnp.isfinite(loss) & jnp.isfinite(mse) & jnp.isfinite(squared)
    before = None
    if rounded.start is not None:
        before = proxy_loss(weight, transform.weight_inverse(rounded.start), hessian, mesh)
    shift = proxy_loss(original, weight, hessian, mesh)
    kronecker = quadratic(weight - dense, hessian, mesh) / factor_norms(hessian, weight.shape[0])
    aligned = loss / jnp.maximum(mse * _undirected(weight, hessian, mesh), jnp.finfo(jnp.float32).tiny)
    used = rounded.output_damping
    found = _Outcome(
        matrix, loss, mse, rounded.damping, rms, dead, ok, shift, before, used, aligned, squared, kronecker
    )
    return found if mesh is None else gathered(found, mesh)


def _undirected(weight: Array, hessian: Hessian, mesh: Mesh | None) -> Array:
    """The expected proxy loss of a white error as large as the weight: `‖W‖² tr(H_in)/n · tr(H_out)/m / tr(W H Wᵀ)`."""
    mean = jnp.trace(hessian.input) / weight.shape[1]
    if hessian.output is not None:
        mean = mean * jnp.trace(hessian.output) / weight.shape[0]
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.sum(jnp.square(weight)) * mean / jnp.maximum(quadratic(weight, hessian, mesh), tiny)


def program(
    weight: Any,
    hessian: Hessian,
    *,
    codebook: Codebook,
    rounding: Rounding,
    incoherence: Incoherence,
    damping: float,
    scale: float | ScaleRule | None,
    correction: float,
    key: Array,
    name: str,
    mesh: Mesh | None = None,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(the compiled program of `quantize_matrix`, its arguments, its options); weight and Hessian may be shapes."""
    arguments = (
        weight,  # host arrays go straight into the program: converting them beforehand would compile another one
        Hessian(hessian.input, hessian.output, cross=hessian.cross),
        codebook,
        np.float32(damping),
        np.float32(correction),
        key if mesh is None else np.asarray(jax.random.key_data(key)),
        np.uint32(name_id(name)),
    )
    rule = default_scale_rule(codebook, scale)
    return _quantize, arguments, {"rounding": rounding, "incoherence": incoherence, "rule": rule, "mesh": mesh}


def quantize_matrix(
    weight: Short,
    hessian: Short,
    *,
    codebook: Short,
    rounding: Short,
    incoherence: Short,
    damping: Short = 0.01,
    scale: Short = None,
    correction: Short = 0.5,
    key: Short,
    name: Short = "matrix",
    mesh: Short = None,
) -> tuple[QuantizedMatrix, MatrixReport]:
    """Quantise one matrix: rotate, scale, round with feedback, pack.

    Minimises `tr((W − Ŵ) H (W − Ŵ)ᵀ)` over the codebook in the rotated basis (QuIP#, 2402.04396, algorithm 1).

    Args:
      weight: `[out, in]`, any float dtype.
      hessian: a `Hessian`: the input second moment `[in, in]` (its scale has no meaning), optionally an output factor
        `[out, out]`; or the array `[in, in]` alone.
      codebook, rounding, incoherence: objects of the `make` functions of their packages, or short forms of them
        ("e8p", ("half_integer", 2), "ldlq", {"name": "ldlq", "passes": 3}, "hadamard"; see `qjax.matrix.arguments`).
      damping: multiple of the mean diagonal added to H before it is factored; raised until the factorisation succeeds.
      scale: None for the codebook's default, a number for the RMS the codebook sees, a `ScaleRule`, or its method.
      correction: with `hessian.cross`, how much of earlier errors the target makes up for (see `corrected_weight`);
        the reported losses are then those of the corrected target.
      key: a seed, or `jax.random.key(seed)`; the layer's key is derived from it and `name`.
      mesh: split the rows over its devices, for roundings whose rows are independent (not stochastic ones, not YAQA);
        the result is the same. All processes of the mesh call this with the same arguments.

    Raises:
      InputError: for shapes that do not belong together, and for arguments of another type or name.
      NumericsError: for values that are not finite, or a Hessian that stays indefinite at the largest damping.
    """
    started = time.perf_counter()
    check_numbers(name, damping=damping, correction=correction)
    weight, hessian, codebook = weight_of(weight, name), hessian_of(hessian, name), codebook_of(codebook)
    rounding, incoherence, mesh = rounding_of(rounding), incoherence_of(incoherence), mesh_of(mesh)
    key = root_key(seed_of(key))
    _validate(weight, hessian, name)
    hessian, small = normalized(hessian), min(0, exponent(weight))
    mesh = None if mesh is None or mesh.size == 1 else mesh
    run, arguments, options = program(
        scaled(weight, -small),
        hessian,
        codebook=codebook,
        rounding=rounding,
        incoherence=incoherence,
        damping=damping,
        scale=scale_of(scale),
        correction=correction,
        key=key,
        name=name,
        mesh=mesh,
    )
    outcome = run(*(arguments if mesh is None else place(arguments, mesh)), **options)
    if mesh is not None:  # what follows computes on one device of every process
        own = jax.device_put(jax.device_get(dataclasses.replace(outcome.matrix, codebook=None)))
        outcome = dataclasses.replace(outcome, matrix=dataclasses.replace(own, codebook=codebook))
    loss, mse, used, rms, dead, ok, shift, before, used_out, aligned, squared, kronecker = jax.device_get(
        (
            outcome.proxy_loss,
            outcome.weight_mse,
            outcome.damping,
            outcome.scale_rms,
            outcome.dead_columns,
            outcome.ok,
            outcome.correction,
            outcome.proxy_loss_before_passes,
            outcome.output_damping,
            outcome.alignment,
            outcome.squared_error,
            outcome.kronecker_loss,
        )
    )
    largest = 0.0 if ok else float(np.max(np.abs(np.asarray(weight, np.float32))))
    if not ok and largest > _LARGE and not np.isfinite([loss, mse, squared]).all():
        raise NumericsError(
            f"layer {name}: the losses are not finite: weights reach {largest:.3g} and their squared sums overflow "
            "float32; check the checkpoint, or scale the layer down"
        )
    if not ok:
        also = "" if used_out is None else f" and {float(used_out):.3g} for its output factor"
        raise NumericsError(
            f"layer {name}: the Hessian could not be factored with damping up to {float(used):.3g} of its mean "
            f"diagonal{also} (proxy loss {float(loss):.3g}); "
            f"use more or shuffled calibration data, or a larger damping than {damping}"
        )
    matrix = outcome.matrix
    if small:
        scaling = dataclasses.replace(matrix.scaling, unit=jnp.ldexp(matrix.scaling.unit, small))
        matrix = dataclasses.replace(matrix, scaling=scaling)
    report = MatrixReport(
        name=name,
        shape=matrix.shape,
        padded=matrix.transform.padded,
        bits_per_weight=matrix.bits_per_weight,
        proxy_loss=float(loss),
        weight_mse=float(mse),
        damping=float(used),
        scale_rms=float(rms),
        dead_columns=int(dead),
        seconds=time.perf_counter() - started,
        correction=float(shift),
        proxy_loss_before_passes=None if before is None else float(before),
        output_damping=None if used_out is None else float(used_out),
        alignment=float(aligned),
        squared_error=float(squared) * 4.0**small,
        kronecker_loss=float(kronecker) * 4.0**small,
    )
    return matrix, report

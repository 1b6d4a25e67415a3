"""Laws of roundings: each takes the name of an algorithm and of a codebook, and raises LawBroken or Refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qjax import rounding
from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.rounding.losses import proxy_loss
from qjax.testing.problems import IN, OUT, LawBroken, Refused, book, finite, in_groups, problem, rounded, the_same

__all__ = ["LAWS", "Law"]

Law = Callable[[str, str], None]


def _random(algorithm: str) -> None:
    if getattr(rounding.make(algorithm), "randomised_by", None) is not None:
        raise Refused("randomised")


def _shaped(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def values_are_the_decoded_codes(algorithm: str, name: str) -> None:
    """What comes out is what a decoder will see, finite, and codes survive packing."""
    result = rounded(algorithm, name, *problem())
    if not bool(result.ok):
        raise LawBroken("ok is False on a well-conditioned problem")
    finite("the rounded matrix", result.values)
    if result.permutation is not None:
        raise LawBroken("a permutation came out that no option asks for")
    the_same("values and decoded codes", result.values, book(name).dequantize(result.codes))
    packed = book(name).pack(result.codes)
    words = -(-int(book(name).bits * OUT * IN) // 32)
    if packed.shape != (words,):
        raise LawBroken(f"packed codes are {packed.shape}; {book(name).bits} bits per weight are {words} words")
    the_same("codes after packing", book(name).unpack(packed, (OUT, IN)), result.codes)


def the_scale_of_the_hessian_has_no_meaning(algorithm: str, name: str) -> None:
    """A Hessian times a power of two gives the same codes."""
    w, h = problem()
    first = rounded(algorithm, name, w, h)
    the_same("codes of H and of H/512", first.codes, rounded(algorithm, name, w, h * np.float32(2.0**-9)).codes)


def without_correlations_feedback_rounds_to_the_nearest(algorithm: str, name: str) -> None:
    """With H = 3 I there is nothing to feed back."""
    _random(algorithm)
    w, _ = problem()
    identity = np.eye(IN, dtype=np.float32) * 3
    nearest = rounded("nearest", name, w, identity)
    the_same("codes with H = 3 I and the nearest", rounded(algorithm, name, w, identity).codes, nearest.codes)


def rows_are_rounded_independently(algorithm: str, name: str) -> None:
    """Permuting the rows permutes the codes (the reason that rows can be sharded)."""
    _random(algorithm)
    if book(name).tile[0] > 1:
        raise Refused("rows are coded jointly")
    w, h = problem()
    order = np.random.default_rng(1).permutation(OUT)
    the_same(
        "codes of permuted rows",
        rounded(algorithm, name, w[order], h).codes,
        np.asarray(rounded(algorithm, name, w, h).codes)[order],
    )


def the_same_inputs_give_the_same_codes(algorithm: str, name: str) -> None:
    """Nothing is left over from the call before."""
    w, h = problem()
    again = rounded(algorithm, name, w.copy(), h.copy())
    the_same("codes of the same inputs", rounded(algorithm, name, w, h).codes, again.codes)


def feedback_beats_nearest_on_correlated_inputs(algorithm: str, name: str) -> None:
    """The proxy loss over three problems is below 0.9 of plain rounding's."""
    _random(algorithm)
    if algorithm == "nearest":
        raise Refused("plain rounding itself")
    losses = {"nearest": 0.0, algorithm: 0.0}
    for seed in range(3):
        w, h = problem(seed)
        for key in losses:
            values = rounded(key, name, w, h).values
            scaled = jnp.asarray(w * np.float32(book(name).rms))
            losses[key] += float(proxy_loss(scaled, values, Hessian(jnp.asarray(h))))
    if not losses[algorithm] < 0.9 * losses["nearest"]:
        share = losses[algorithm] / losses["nearest"]
        raise LawBroken(f"the proxy loss is {share:.3f} of plain rounding's; feedback brings it below 0.9")


def zero_weights_stay_finite(algorithm: str, name: str) -> None:
    """A matrix of zeros, which pruned models have."""
    _, h = problem()
    finite("a rounded matrix of zeros", rounded(algorithm, name, np.zeros((OUT, IN), np.float32), h).values)


def the_smallest_sizes_are_coded(algorithm: str, name: str) -> None:
    """A matrix of one tile, one row or one column of tiles, each with one group as wide as the matrix, or wider.

    All are traced; a single weight is computed as well, which has nothing to feed back to.
    """
    rows, columns = book(name).tile
    for shape, group in (((rows, columns), columns), ((rows, IN), IN), ((OUT, columns), 2 * columns)):
        traced = functools.partial(in_groups, algorithm, name, group)
        values, packed, scales = jax.eval_shape(traced, *map(_shaped, (shape, (shape[1],) * 2)))
        words = -(-int(book(name).bits * shape[0] * shape[1]) // 32)
        if (values.shape, packed.shape, scales.shape) != (shape, (words,), (shape[0], 1)):
            raise LawBroken(
                f"a matrix {list(shape)} in groups of {group} came out as {list(values.shape)} in {packed.shape[0]} "
                f"words with scales {list(scales.shape)}; its codes take {words}"
            )
    if (rows, columns) == (1, 1):
        one, hessian = np.full((1, 1), 0.3, np.float32), np.full((1, 1), 3, np.float32)
        compute = lambda key: jax.jit(functools.partial(in_groups, key, name, 1))(one, hessian)[0]  # noqa: E731
        found = compute(algorithm)
        finite("a rounded weight", found)
        if getattr(rounding.make(algorithm), "randomised_by", None) is None:
            the_same("one weight and the nearest", found, compute("nearest"))


def shapes_that_do_not_fit_are_refused(algorithm: str, name: str) -> None:
    """A Hessian of another width is refused by name."""
    w, h = problem()
    try:
        small = Hessian(jnp.asarray(h[:8, :8]))
        rounding.make(algorithm)(jnp.asarray(w), small, book(name), key=jax.random.key(0))
    except InputError as error:
        if "Hessian has shape" not in str(error):
            raise Refused(str(error)) from error
        return
    raise LawBroken("a Hessian [8, 8] of a weight with 64 inputs was taken")


LAWS: Mapping[str, Law] = {
    law.__name__: law
    for law in (
        values_are_the_decoded_codes,
        the_scale_of_the_hessian_has_no_meaning,
        without_correlations_feedback_rounds_to_the_nearest,
        rows_are_rounded_independently,
        the_same_inputs_give_the_same_codes,
        feedback_beats_nearest_on_correlated_inputs,
        zero_weights_stay_finite,
        the_smallest_sizes_are_coded,
        shapes_that_do_not_fit_are_refused,
    )
}
